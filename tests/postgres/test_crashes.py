"""A crash at every step of every write, with blobs in S3 and the catalogue in PostgreSQL: all or
nothing is seen afterwards, and the write can be done again."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from crashes import Died, Mortal, bury, observed
from object_store import ObjectStore
from postgres_server import PostgresServer
from registry_writes import NAMES, a_vector, archive, prepare, writes

from steer.registry.registry import Registry

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return archive(tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_a_crash_at_every_step(
    postgres: PostgresServer, store: ObjectStore, exported: bytes, name: str, after: bool
) -> None:
    """A step that changed nothing leaves the same state for the next one, so that the base is
    only made again after a change."""
    write = writes(exported)[name]
    place: dict[str, str] = {}
    before: dict[str, object] = {}

    def renew() -> None:
        place.update(location=store.url(), catalogue=postgres.url())
        with Registry.open(**place) as registry:
            prepare(registry)
            before.update(observed(registry))

    renew()
    with Registry.open(**place) as registry:
        write(registry)
        done = observed(registry)
    renew()
    step = 0
    while True:
        registry = Registry.open(**place)
        mortal = Mortal(step, after=after)
        with mortal.living([registry._blobs._fs]), suppress(Died):
            write(registry)
        bury(registry)
        if not mortal.dead:
            break
        with Registry.open(**place) as registry:
            seen = observed(registry)
            if name == "collect":
                assert {**seen, "removed": [], "tags": []} == {**done, "removed": [], "tags": []}
                assert set(done["removed"]) <= set(seen["removed"]) <= set(before["removed"])
                registry.collect_garbage(grace_seconds=0)
                assert observed(registry) == done
            else:
                assert seen in (before, done), mortal.steps
        if seen != before:
            renew()
        step += 1
    assert step >= 2
    with Registry.open(**place) as registry:
        assert observed(registry) == done


def test_a_crash_at_every_step_of_making_a_registry(
    postgres: PostgresServer, store: ObjectStore
) -> None:
    step = 0
    while True:
        place = {"location": store.url(), "catalogue": postgres.url()}
        mortal = Mortal(step, after=bool(step % 2))
        with mortal.living(), suppress(Died):
            registry = Registry.open(**place)
        if not mortal.dead:
            registry.close()
            break
        with Registry.open(**place) as registry:
            registry.add("v", a_vector(1))
            assert len(observed(registry)["live"]) == 1
        step += 1
    assert step > 10, mortal.steps


def test_a_folder_moves_to_machines_that_share(
    postgres: PostgresServer, store: ObjectStore, tmp_path: Path
) -> None:
    """The folder of the first schema, its archive, and the same registry in S3 and PostgreSQL."""
    old = Path(__file__).parents[1] / "unit" / "registry" / "version-1"
    with Registry.open(shutil.copytree(old, tmp_path / "old")) as registry:
        seen = observed(registry)
        target = io.BytesIO()
        registry.export_archive(target)
    with Registry.open(store.url(), catalogue=postgres.url()) as registry:
        registry.import_archive(io.BytesIO(target.getvalue()))
        assert observed(registry) == seen
        again = io.BytesIO()
        registry.export_archive(again)
        assert again.getvalue() == target.getvalue()
        assert registry.import_archive(io.BytesIO(target.getvalue())).versions == 0
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
