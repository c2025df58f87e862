"""The plan store: bytes by hash, shared by processes, pruned by time of use."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from artefacts import EVERYTHING, random_sae, random_vector, shape_of
from liveness import LIVENESS_SECONDS

from steer.errors import FileFormatError, SteerError, StorageError, TooLarge
from steer.plan.cache import PlanCache
from steer.plan.file import dump_plan, load_plan
from steer.registry.blobs.blobs import BlobStore
from steer.registry.blobs.plan_store import TOUCH_SECONDS, PlanStore
from steer.registry.registry import Registry
from steer.spec import parse_spec

PLAN = b"the bytes of a plan"
SHA256 = hashlib.sha256(PLAN).hexdigest()
DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> PlanStore:
    return PlanStore(tmp_path, clock=clock)


def place(root: Path, sha256: str = SHA256) -> Path:
    return root / "plans" / sha256[:2] / sha256


def plans_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "plans").glob("*/*"))


def test_what_was_put_is_got(store: PlanStore, tmp_path: Path) -> None:
    assert store.put(PLAN) == SHA256
    assert store.put(PLAN) == SHA256
    assert store.get(SHA256) == PLAN
    assert PlanStore(tmp_path).get(SHA256) == PLAN
    assert PlanStore(f"file://{tmp_path}/").get(SHA256) == PLAN
    assert plans_in(tmp_path) == [SHA256]


def test_a_store_need_not_be_on_a_disk(clock: Clock) -> None:
    location = "memory://a-plan-store"
    store = PlanStore(location, clock=clock)
    with pytest.raises(StorageError, match="is not in the plan store"):
        store.get(SHA256)
    assert PlanStore(location, clock=clock).put(PLAN) == SHA256
    assert store.put(PLAN) == SHA256
    assert store.get(SHA256) == PLAN
    assert store.prune(DAY, clock.now + 9 * DAY) == 0
    assert store.get(SHA256) == PLAN


def test_a_missing_plan_is_named(store: PlanStore) -> None:
    with pytest.raises(StorageError, match=SHA256[:12]) as caught:
        store.get(SHA256)
    assert caught.value.code == "missing_plan"


@pytest.mark.parametrize("sha256", ["", "ab", "../" * 21 + "a", "A" * 64, SHA256 + "\n"])
def test_only_hashes_name_files(store: PlanStore, sha256: str) -> None:
    for read in (store.get, store.sae):
        with pytest.raises(StorageError, match="not a sha256"):
            read(sha256)


@pytest.mark.parametrize("left", [b"", PLAN[:5], b"\0" * len(PLAN)])
def test_a_plan_damaged_in_a_crash_is_refused_and_put_again(tmp_path: Path, left: bytes) -> None:
    PlanStore(tmp_path).put(PLAN)
    place(tmp_path).write_bytes(left)
    after = PlanStore(tmp_path)
    with pytest.raises(StorageError, match="damaged") as caught:
        after.get(SHA256)
    assert caught.value.code == "damaged_plan"
    after.put(PLAN)
    assert after.get(SHA256) == PLAN


def test_a_plan_has_a_largest_size(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="at most 10"):
        PlanStore(tmp_path, max_plan_bytes=10).put(PLAN)
    assert plans_in(tmp_path) == []


def test_a_plan_put_lately_costs_no_disk(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(PLAN)
    monkeypatch.setattr(BlobStore, "open", None)
    monkeypatch.setattr(BlobStore, "publish", None)
    assert store.put(PLAN) == SHA256


def test_putting_waits_for_no_disk(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise AssertionError("fsync")

    monkeypatch.setattr(os, "fsync", refuse)
    store.put(PLAN)
    assert store.get(SHA256) == PLAN


def test_what_is_remembered_is_bounded(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("steer.registry.blobs.plan_store._REMEMBERED", 3)
    hashes = [store.put(bytes([n])) for n in range(8)]
    assert list(store._used) == hashes[-3:]
    assert len(plans_in(tmp_path)) == 8
    assert [store.put(bytes([n])) for n in range(8)] == hashes


def test_a_failing_disk_leaves_nothing_behind(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left"):
            store.put(PLAN)
    assert plans_in(tmp_path) == []
    assert store.put(PLAN) == SHA256
    assert store.get(SHA256) == PLAN


def test_threads_put_the_same_plan(store: PlanStore, tmp_path: Path) -> None:
    plans = [bytes([n]) * 5_000 for n in range(20)]
    barrier = Barrier(8)

    def work(_: int) -> list[bytes]:
        barrier.wait()
        return [store.get(store.put(plan)) for plan in plans]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [plans] * 8
    assert len(plans_in(tmp_path)) == 20


PUT = """
import sys
from steer.registry.blobs.plan_store import PlanStore
store = PlanStore(sys.argv[1])
sys.stdin.readline()
for n in range(200):
    data = bytes([n]) * 20_000
    assert store.get(store.put(data)) == data
"""


@pytest.mark.slow
def test_processes_put_the_same_plans(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT, str(tmp_path)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    assert [process.wait(LIVENESS_SECONDS) for process in running] == [0, 0]
    assert len(plans_in(tmp_path)) == 200


# Pruning


def test_plans_not_used_are_pruned(store: PlanStore, clock: Clock, tmp_path: Path) -> None:
    old = store.put(b"old")
    clock.now += DAY
    store.put(PLAN)
    assert store.prune(2 * DAY, clock.now) == 0
    assert store.prune(DAY / 2, clock.now) == 1
    assert plans_in(tmp_path) == [SHA256]
    with pytest.raises(StorageError):
        store.get(old)
    assert store.put(b"old") == old  # not believed to be there still
    assert store.get(old) == b"old"


@pytest.mark.parametrize("use", ["get", "put"])
def test_use_keeps_a_plan(tmp_path: Path, clock: Clock, use: str) -> None:
    PlanStore(tmp_path, clock=clock).put(PLAN)
    worker = PlanStore(tmp_path, clock=clock)
    for _ in range(10):
        clock.now += DAY
        if use == "get":
            worker.get(SHA256)
        else:
            worker.put(PLAN)
        assert PlanStore(tmp_path, clock=clock).prune(DAY / 2) == 0
    clock.now += DAY
    assert PlanStore(tmp_path, clock=clock).prune(DAY / 2) == 1


def test_times_of_use_are_written_once_an_hour(
    store: PlanStore, clock: Clock, tmp_path: Path
) -> None:
    store.put(PLAN)
    first = place(tmp_path).stat().st_mtime
    clock.now += TOUCH_SECONDS - 1
    store.put(PLAN)
    store.get(SHA256)
    assert place(tmp_path).stat().st_mtime == first
    clock.now += 1
    store.get(SHA256)
    assert place(tmp_path).stat().st_mtime == first + TOUCH_SECONDS


def test_a_plan_pruned_by_another_process_is_put_again(
    store: PlanStore, clock: Clock, tmp_path: Path
) -> None:
    """However the two are timed: what one remembers, the other cannot have pruned yet."""
    store.put(PLAN)
    for _ in range(12):
        clock.now += TOUCH_SECONDS / 2 - 1
        PlanStore(tmp_path, clock=clock).prune(2 * TOUCH_SECONDS)
        store.put(PLAN)
        assert PlanStore(tmp_path, clock=clock).get(SHA256) == PLAN
    clock.now += 5 * TOUCH_SECONDS
    assert PlanStore(tmp_path, clock=clock).prune(2 * TOUCH_SECONDS) == 1
    store.put(PLAN)
    assert PlanStore(tmp_path, clock=clock).get(SHA256) == PLAN


def test_plans_in_use_are_never_pruned(store: PlanStore) -> None:
    with pytest.raises(SteerError, match="7200 seconds or more") as caught:
        store.prune(TOUCH_SECONDS)
    assert caught.value.code == "invalid_age"


def test_what_a_dead_process_left_is_pruned(store: PlanStore, clock: Clock, tmp_path: Path) -> None:
    store.put(PLAN)
    left = tmp_path / "plans" / "staging" / "0123"
    left.write_bytes(b"half")
    os.utime(left, (clock.now - DAY, clock.now - DAY))
    assert store.prune(DAY / 2) == 0  # it was no plan
    assert plans_in(tmp_path) == [SHA256]


def test_a_worker_may_be_unable_to_renew_a_plan(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put(PLAN)

    def refuse(*_args: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("steer.registry.blobs.plan_store.utime", refuse)
    assert PlanStore(tmp_path).get(SHA256) == PLAN


# SAEs


def test_saes_are_those_of_the_registry(registry: Registry, tmp_path: Path) -> None:
    sae = random_sae("topk", seed=3)
    registry.add("topk", sae)
    store = PlanStore(tmp_path / "registry")
    found = store.sae(sae.sha256)
    assert found.to_bytes() == sae.to_bytes()
    assert store.sae(sae.sha256) is found


def test_saes_in_memory_are_bounded(registry: Registry, tmp_path: Path) -> None:
    saes = [random_sae("topk", seed=seed) for seed in range(3)]
    for n, sae in enumerate(saes):
        registry.add(f"s{n}", sae)
    store = PlanStore(tmp_path / "registry", cache_bytes=2 * saes[0].resident_bytes())
    first = [store.sae(sae.sha256) for sae in saes]
    assert store.sae(saes[2].sha256) is first[2]
    assert store.sae(saes[1].sha256) is first[1]
    again = store.sae(saes[0].sha256)
    assert again is not first[0]
    assert again.to_bytes() == first[0].to_bytes()


def test_an_sae_removed_meanwhile_stays_in_memory(registry: Registry, tmp_path: Path) -> None:
    sae = random_sae("topk")
    registry.add("topk", sae)
    store = PlanStore(tmp_path / "registry")
    found = store.sae(sae.sha256)
    registry.remove("sae", "topk")
    # A worker holds the SAE by its hash, so that it stays for all workers, whatever the grace.
    assert registry.collect_garbage(grace_seconds=0).leased == 1
    assert PlanStore(tmp_path / "registry").sae(sae.sha256).to_bytes() == sae.to_bytes()
    (tmp_path / "registry" / "leases" / sae.sha256).write_text("0")  # it ended long ago
    assert registry.collect_garbage(grace_seconds=0).blobs == 1
    assert store.sae(sae.sha256) is found
    with pytest.raises(StorageError, match=sae.sha256[:12]):
        PlanStore(tmp_path / "registry").sae(sae.sha256)


def test_what_is_no_sae_is_refused(registry: Registry, tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "registry")
    vector = random_vector(0, 1)
    registry.add("v", vector)
    with pytest.raises(FileFormatError, match="not a canonical SAE"):
        store.sae(vector.sha256)


@pytest.mark.parametrize("sae", ["topk", "topk-rescaled", "topk-centred"])
def test_a_plan_travels_from_a_registry_to_a_worker(
    registry: Registry, tmp_path: Path, sae: str
) -> None:
    registry.add("topk", random_sae(sae))
    spec = {"interventions": [{"kind": "clamp", "sae": "topk", "features": [2], "value": 3.0}]}
    plan = PlanCache(registry, shape_of(), EVERYTHING).plan(parse_spec(spec))
    sha256 = PlanStore(tmp_path / "registry").put(dump_plan(plan))
    worker = PlanStore(tmp_path / "registry")
    back = load_plan(worker.get(sha256), worker.sae, model=shape_of())
    assert back.fingerprint == plan.fingerprint
    (mine,), (other,) = back.rules[0].blocks.values(), plan.rules[0].blocks.values()
    assert mine.encoder is other.encoder
    with Registry.open(tmp_path / "registry") as reopened:  # which cleans up its own folders only
        assert reopened.entry("sae", "topk")
    assert worker.get(sha256)
