"""Garbage collection: what goes, and above all what stays."""

import os
import time
from pathlib import Path

import pytest
import torch
from artefacts import random_sae

from steer.artefacts.control_vector import ControlVector
from steer.errors import SteerError, UnknownArtefact
from steer.registry.blobs.blobs import BlobStore
from steer.registry.blobs.leases import LEASE_SECONDS, Leases
from steer.registry.blobs.plan_store import PlanStore
from steer.registry.profiles import Profile
from steer.registry.registry import Registry


def a_vector(value: float = 1.0) -> ControlVector:
    return ControlVector.of({0: torch.full((4,), value)})


def blobs_of(root: Path) -> set[str]:
    return {path.name for path in (root / "registry" / "blobs").glob("*/*")}


def test_only_what_was_removed_long_ago_goes(registry: Registry, tmp_path: Path) -> None:
    registry.add("v", a_vector(1))
    registry.add("gone", a_vector(2))
    registry.add("gone", a_vector(3))
    registry.add("copy", a_vector(3))
    registry.remove("vector", "gone")
    assert registry.collect_garbage().versions == 0  # a week, by default
    assert registry.collect_garbage(grace_seconds=86_400).versions == 0
    planned = registry.collect_garbage(grace_seconds=0, dry_run=True)
    assert (planned.versions, planned.blobs, planned.dry_run) == (1, 1, True)
    assert planned.bytes == len(a_vector(2).to_bytes())
    assert len(blobs_of(tmp_path)) == 3
    done = registry.collect_garbage(grace_seconds=0)
    assert (done.versions, done.blobs, done.bytes) == (1, 1, planned.bytes)
    # The other version shares its content with a live name, so that it costs nothing to keep.
    assert blobs_of(tmp_path) == {a_vector(1).sha256, a_vector(3).sha256}
    assert registry.restore("vector", "gone").sha256 == a_vector(3).sha256
    with pytest.raises(UnknownArtefact, match="collected"):
        registry.restore("vector", f"gone@{a_vector(2).sha256[:12]}")
    assert registry.add("gone", a_vector(2))[0].version == 3
    with pytest.raises(SteerError, match="0 or more"):
        registry.collect_garbage(grace_seconds=-1)


def test_what_profiles_and_aliases_name_stays_even_if_somebody_marked_it_removed(
    registry: Registry, tmp_path: Path
) -> None:
    """Removal refuses it; here the rows are marked past that check, as by hand."""
    entries = [registry.add(name, a_vector(n + 1))[0] for n, name in enumerate("abc")]
    registry.set_alias("vector", "alias", entries[0].id)
    spec = {"interventions": [{"kind": "add", "vector": entries[1].id}]}
    registry.put_profile(Profile(name="p", spec=spec))
    with registry._catalogue.writing() as connection:
        registry._catalogue.mark_removed(connection, entries)
    assert registry.collect_garbage(grace_seconds=0).blobs == 1
    assert blobs_of(tmp_path) == {entries[0].sha256, entries[1].sha256}


def test_what_a_process_has_loaded_stays_for_its_lease(registry: Registry, tmp_path: Path) -> None:
    sae = random_sae("topk")
    registry.add("features", sae)
    registry.sae("features")  # as the plan of a request does
    registry.remove("sae", "features")
    done = registry.collect_garbage(grace_seconds=0)
    assert (done.versions, done.blobs, done.leased) == (0, 0, 1)
    assert PlanStore(tmp_path / "registry").sae(sae.sha256)  # a worker, later
    later = Leases(
        str(tmp_path / "registry" / "leases"), clock=lambda: time.time() + LEASE_SECONDS + 1
    )
    assert not later.is_held(sae.sha256)
    registry._leases._clock = later._clock
    assert registry.collect_garbage(grace_seconds=0).blobs == 1
    assert blobs_of(tmp_path) == set()
    assert list((tmp_path / "registry" / "leases").iterdir()) == []


def test_a_lease_is_renewed_once_an_hour(tmp_path: Path) -> None:
    now = [1000.0]
    leases = Leases(str(tmp_path), clock=lambda: now[0])
    leases.take("a" * 64)
    written = (tmp_path / ("a" * 64)).read_text()
    for _ in range(20):
        now[0] += 3600 / 2 - 1
        leases.take("a" * 64)
        assert Leases(str(tmp_path), clock=lambda: now[0] + LEASE_SECONDS - 3600).is_held("a" * 64)
    assert (tmp_path / ("a" * 64)).read_text() != written
    assert not Leases(str(tmp_path)).is_held("b" * 64)


def test_a_lease_that_cannot_be_written_does_not_stop_a_read(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.add("v", a_vector(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Leases, "hold", full)
    assert registry.vector("v").sha256 == a_vector(1).sha256
    assert "could not be leased" in caplog.text


def test_an_upload_on_its_way_is_left_alone_and_an_old_one_goes(
    registry: Registry, tmp_path: Path
) -> None:
    for value in (1.0, 2.0):
        registry._publish(a_vector(value))
    old = registry._blobs.local_path(a_vector(1).sha256)
    os.utime(old, (time.time() - 7200,) * 2)
    assert registry.collect_garbage(dry_run=True).blobs == 1
    assert registry.collect_garbage().blobs == 1
    assert blobs_of(tmp_path) == {a_vector(2).sha256}


def test_a_blob_collected_between_its_upload_and_its_row_is_sent_again(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = BlobStore.publish, []

    def publish(blobs: BlobStore, staged: Path, sha256: str) -> None:
        real(blobs, staged, sha256)
        calls.append(sha256)
        if len(calls) == 1:
            with Registry.open(tmp_path / "registry"):  # which removes what has no row
                pass
            assert blobs_of(tmp_path) == set()

    monkeypatch.setattr(BlobStore, "publish", publish)
    registry.add("v", a_vector(1))
    assert calls == [a_vector(1).sha256] * 2
    assert registry.vector("v").sha256 == a_vector(1).sha256


def test_plans_not_used_for_as_long_go_as_well(registry: Registry, tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "registry", clock=lambda: time.time() - 30 * 86_400)
    store.put(b"old")
    PlanStore(tmp_path / "registry").put(b"new")
    assert registry.collect_garbage().plans == 1
    assert registry.collect_garbage(grace_seconds=0).plans == 0  # two hours at least
