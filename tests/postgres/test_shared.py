"""A registry that machines share: blobs in S3, the catalogue in PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch
from liveness import LIVENESS_SECONDS
from object_store import ObjectStore
from postgres_server import PostgresServer

from steer.artefacts.control_vector import ControlVector
from steer.errors import Conflict, SteerError, StorageError, UnknownArtefact
from steer.registry.blobs.plan_store import PlanStore
from steer.registry.profiles import Profile
from steer.registry.registry import Registry

pytestmark = pytest.mark.slow


def a_vector(value: float, **card: object) -> ControlVector:
    return ControlVector.of({0: torch.full((4,), value)}, **card)


@pytest.fixture
def place(postgres: PostgresServer, store: ObjectStore) -> dict[str, str]:
    return {"location": store.url(), "catalogue": postgres.url()}


@pytest.fixture
def registry(place: dict[str, str]) -> Iterator[Registry]:
    with Registry.open(**place) as opened:
        yield opened


def blobs_in(store: ObjectStore, place: dict[str, str]) -> set[str]:
    return {Path(name).name for name in store.files(place["location"] + "/blobs")}


def test_the_whole_life_of_a_name(
    registry: Registry, store: ObjectStore, place: dict[str, str]
) -> None:
    one, created = registry.add("v", a_vector(1, description="Speaks French", model="demo"))
    assert created
    two, _ = registry.add("v", a_vector(2))
    assert registry.add("v", a_vector(2)) == (two, False)
    assert registry.vector("v").sha256 == two.sha256
    assert registry.vector(one.id).sha256 == one.sha256
    assert blobs_in(store, place) == {one.sha256, two.sha256}

    registry.set_alias("vector", "prod", one.id)
    assert registry.vector("prod").sha256 == one.sha256
    assert registry.change_tags("vector", "v", add=["tone", "beta"]) == ("beta", "tone")
    spec = {"interventions": [{"kind": "add", "vector": "v"}]}
    held = registry.put_profile(Profile(name="p", spec=spec), pin=True)
    assert held.spec.interventions[0].vector == two.id
    assert registry.profile("p") == held
    with pytest.raises(Conflict, match="the aliases prod and the profiles p"):
        registry.remove("vector", "v")
    registry.unset_alias("vector", "prod")
    registry.remove_profile("p")
    assert [e.name for e in registry.entries(query="TON")] == ["v"]
    assert [e.name for e in registry.entries(tag="beta", width=4)] == ["v"]
    registry.remove("vector", "v")
    assert registry.entries() == []
    assert [e.id for e in registry.entries(deleted=True)] == [two.id]
    assert registry.restore("vector", one.id).id == one.id
    registry.remove("vector", "v")
    assert registry.collect_garbage(grace_seconds=0).leased == 2  # both were loaded just now
    for sha256 in (one.sha256, two.sha256):
        fsspec.filesystem("s3").pipe_file(f"{place['location']}/leases/{sha256}", b"0")
    done = registry.collect_garbage(grace_seconds=0)
    assert (done.versions, done.blobs) == (2, 2)
    assert blobs_in(store, place) == set()
    with pytest.raises(UnknownArtefact, match="collected"):
        registry.restore("vector", "v")
    assert registry.add("v", a_vector(1))[0].version == 3


def test_another_registry_sees_every_change(registry: Registry, place: dict[str, str]) -> None:
    with Registry.open(**place) as other:
        states = [other._catalogue.state()]

        def changed() -> bool:
            states.append(other._catalogue.state())
            return states[-1] != states[-2]

        registry.add("v", a_vector(1))
        assert changed()
        assert other.vector("v").sha256 == a_vector(1).sha256
        assert not changed()
        registry.add("v", a_vector(2))
        assert changed()
        assert other.vector("v").sha256 == a_vector(2).sha256
        registry.set_alias("vector", "a", "v")
        assert changed()
        assert other.vector("a").sha256 == a_vector(2).sha256
        registry.unset_alias("vector", "a")
        registry.remove("vector", "v")
        assert changed()
        with pytest.raises(UnknownArtefact):
            other.vector("v")


def test_what_is_seen_is_never_older_than_its_number(registry: Registry) -> None:
    """A reader that takes the number first and the rows then keeps no old rows under a new number,
    because both are committed together."""
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            registry.add("v", a_vector(number + 1.0))
        done.set()

    worker = threading.Thread(target=write)
    worker.start()
    seen: dict[int, int] = {}
    try:
        while not done.is_set():
            number = registry._catalogue.state()
            with registry._catalogue.reading() as connection:
                version = registry._catalogue.last_version(connection, "vector", "v")
            if registry._catalogue.state() == number:
                assert seen.setdefault(number, version) == version
    finally:
        worker.join()
    assert len(registry.versions("vector", "v")) == 60


def test_writers_take_turns(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda n: registry.add("v", a_vector(n + 1.0))[0], range(24)))
    assert sorted(entry.version for entry in added) == list(range(1, 25))


REPLICA = """
import os, sys
from steer.errors import UnknownArtefact
from steer.registry.registry import Registry

with Registry.open(os.environ["STEER_REGISTRY"], catalogue=os.environ.get("STEER_CATALOGUE")) as r:
    print("open", flush=True)
    for line in sys.stdin:
        try:
            print(r.vector(line.strip()).sha256, flush=True)
        except UnknownArtefact as error:
            print(error.code, flush=True)
"""


@pytest.mark.parametrize("shared", ["postgres and s3", "folder"])
def test_an_upload_in_one_process_serves_the_next_request_of_another(
    shared: str, postgres: PostgresServer, store: ObjectStore, tmp_path: Path
) -> None:
    environment = {**os.environ, "STEER_CACHE": str(tmp_path / "other-machine")}
    if shared == "folder":
        place = {"location": str(tmp_path / "registry")}
    else:
        place = {"location": store.url(), "catalogue": postgres.url()}
        environment["STEER_CATALOGUE"] = place["catalogue"]
    environment["STEER_REGISTRY"] = place["location"]
    with (
        Registry.open(**place) as registry,
        subprocess.Popen(
            [sys.executable, "-c", REPLICA],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as replica,
    ):

        def asked(ref: str) -> str:
            replica.stdin.write(ref + "\n")
            replica.stdin.flush()
            return replica.stdout.readline().strip()

        assert replica.stdout.readline() == "open\n"
        assert asked("v") == "unknown_vector"
        for value in (1.0, 2.0, 3.0):
            registry.add("v", a_vector(value))
            assert asked("v") == a_vector(value).sha256
        registry.set_alias("vector", "stable", f"v@{a_vector(1.0).sha256}")
        assert asked("stable") == a_vector(1.0).sha256
        registry.set_alias("vector", "stable", "v")
        assert asked("stable") == a_vector(3.0).sha256
        registry.unset_alias("vector", "stable")
        registry.remove("vector", "v")
        assert asked("v") == "unknown_vector"
        registry.restore("vector", "v")
        assert asked("v") == a_vector(3.0).sha256
        replica.stdin.close()


WRITER = """
import os, sys, torch
from steer.artefacts.control_vector import ControlVector
from steer.registry.registry import Registry

first = int(sys.argv[1])
with Registry.open(os.environ["STEER_REGISTRY"], catalogue=os.environ["STEER_CATALOGUE"]) as r:
    for seed in range(first, first + 10):
        vector = ControlVector.of({0: torch.full((4,), float(seed + 1))})
        r.add("shared", vector)
        r.add(f"own-{seed}", vector)
        assert r.vector(f"own-{seed}").sha256 == vector.sha256
"""


def test_processes_open_an_empty_place_and_write_at_once(place: dict[str, str]) -> None:
    environment = {
        **os.environ,
        "STEER_REGISTRY": place["location"],
        "STEER_CATALOGUE": place["catalogue"],
    }
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, first], env=environment)
        for first in ("0", "100")
    ]
    assert [writer.wait(LIVENESS_SECONDS) for writer in writers] == [0, 0]
    with Registry.open(**place) as registry:
        assert registry.stats().artefacts == {"vector": 21}
        assert [e.version for e in registry.versions("vector", "shared")] == list(range(20, 0, -1))


def test_plans_and_saes_reach_a_worker_without_a_catalogue(
    registry: Registry, place: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from artefacts import random_sae

    sae = random_sae("topk")
    registry.add("features", sae)
    plan = PlanStore(place["location"]).put(b"a plan")
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "worker"))
    worker = PlanStore(place["location"])
    assert worker.get(plan) == b"a plan"
    assert worker.sae(sae.sha256).to_bytes() == sae.to_bytes()


def test_a_copy_on_this_machine_is_read_and_repaired(
    registry: Registry, place: dict[str, str], tmp_path: Path
) -> None:
    entry, _ = registry.add("v", a_vector(1))
    registry.vector("v")
    copy = tmp_path / "cache" / "blobs" / entry.sha256
    assert copy.read_bytes() == a_vector(1).to_bytes()
    copy.write_bytes(b"damaged")
    with Registry.open(**place) as other:
        assert other.vector("v").sha256 == entry.sha256
    assert copy.read_bytes() == a_vector(1).to_bytes()


def test_what_is_damaged_in_the_store_is_refused_and_repaired(
    registry: Registry, place: dict[str, str]
) -> None:
    entry, _ = registry.add("v", a_vector(1))
    path = f"{place['location']}/blobs/{entry.sha256[:2]}/{entry.sha256}"
    fsspec.filesystem("s3").pipe_file(path, b"\0" * entry.size_bytes)
    with pytest.raises(StorageError, match="damaged"):
        registry.vector("v")
    assert registry.add("v", a_vector(1)) == (entry, False)
    assert registry.vector("v").sha256 == entry.sha256


def test_a_catalogue_rules_its_own_blobs_only(
    registry: Registry, place: dict[str, str], postgres: PostgresServer, store: ObjectStore
) -> None:
    registry.add("v", a_vector(1))
    for other in (
        {"location": place["location"], "catalogue": postgres.url()},
        {"location": store.url(), "catalogue": place["catalogue"]},
    ):
        if other["location"] == place["location"]:
            with pytest.raises(StorageError) as raised:
                Registry.open(**other)
            assert raised.value.code == "wrong_catalogue"
    assert registry.vector("v").sha256 == a_vector(1).sha256


def test_a_server_that_was_restarted_is_found_again(registry: Registry) -> None:
    registry.add("v", a_vector(1))
    registry.vector("v")
    with registry._catalogue.engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )
    assert registry.vector("v").sha256 == a_vector(1).sha256
    assert registry.add("v", a_vector(2))[1]


def test_a_password_is_never_shown(postgres: PostgresServer, store: ObjectStore) -> None:
    url = postgres.url().replace(postgres.password, "a-wrong-password")
    with pytest.raises(StorageError) as raised:
        Registry.open(store.url(), catalogue=url)
    assert "a-wrong-password" not in str(raised.value)


def test_a_text_with_nul_is_refused_by_name(registry: Registry) -> None:
    """PostgreSQL has no such texts, and would fail."""
    for call in (
        lambda: registry.entries("vector", query="\0"),
        lambda: registry.jobs.get("\0"),
        lambda: registry.add("v", a_vector(1, description="a\0b")),
    ):
        with pytest.raises(SteerError) as raised:
            call()
        assert (raised.value.status, raised.value.code) == (400, "invalid_value")
