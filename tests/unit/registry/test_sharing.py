"""Many threads and many processes on one registry; the cost of a lookup."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from liveness import LIVENESS_SECONDS
from sqlalchemy import event

from steer.artefacts.control_vector import ControlVector
from steer.errors import UnknownArtefact
from steer.registry.catalogue.catalogue import Draft
from steer.registry.registry import Registry


def a_vector(seed: int) -> ControlVector:
    return ControlVector.of({0: torch.full((4,), float(seed + 1))})


WRITER = """
import sys, torch
from steer.artefacts.control_vector import ControlVector
from steer.registry.registry import Registry

root, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Registry.open(root) as registry:
    for seed in range(first, first + count):
        vector = ControlVector.of({0: torch.full((4,), float(seed + 1))})
        registry.add(f"own-{seed}", vector)
        registry.add("shared", vector)
        assert registry.vector(f"own-{seed}").sha256 == vector.sha256
"""


def test_threads_add_and_read_at_once(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda n: registry.add(f"v{n % 20}", a_vector(n % 20)), range(80)))
        assert sum(created for _, created in added) == 20
        list(pool.map(lambda n: registry.vector(f"v{n % 20}"), range(80)))
    assert registry.stats().artefacts == {"vector": 20}
    assert registry.stats().operations["load"] == 20  # once each, however many asked


def test_threads_that_add_versions_get_different_numbers(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda n: registry.add("v", a_vector(n))[0], range(40)))
    assert sorted(entry.version for entry in added) == list(range(1, 41))
    assert len(registry.versions("vector", "v")) == 40


def test_adding_while_removing_never_loses_an_acknowledged_blob(registry: Registry) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            registry.add("other", a_vector(0))
            registry.remove("vector", "other")

    worker = threading.Thread(target=churn)
    worker.start()
    try:
        for number in range(30):
            entry, _ = registry.add(f"v{number}", a_vector(0))  # the same content as `other`
            with registry.content("vector", entry.id) as stream:
                assert len(stream.read()) == entry.size_bytes
            registry.remove("vector", f"v{number}")
    finally:
        stop.set()
        worker.join()


@pytest.mark.slow
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), first, "15"])
        for first in ("0", "100")
    ]
    assert [writer.wait(LIVENESS_SECONDS) for writer in writers] == [0, 0]
    with Registry.open(tmp_path) as registry:
        assert registry.stats().artefacts == {"vector": 31}
        assert len(registry.versions("vector", "shared")) == 30
        for seed in (*range(15), *range(100, 115)):
            assert registry.vector(f"own-{seed}").sha256 == a_vector(seed).sha256


def test_another_registry_on_the_folder_is_seen(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as one, Registry.open(tmp_path) as two:
        one.add("v", a_vector(1))
        assert two.vector("v").sha256 == a_vector(1).sha256
        one.add("v", a_vector(2))
        assert two.vector("v").sha256 == a_vector(2).sha256
        one.remove("vector", "v")
        with pytest.raises(UnknownArtefact):
            two.vector("v")


def test_opening_again_leaves_a_living_upload_alone(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as one, one.upload() as upload:
        upload.write(a_vector(1).to_bytes())
        with Registry.open(tmp_path):
            assert upload.path.exists()
        entry, _ = one.import_file(upload.path, name="v")
        assert entry.sha256 == a_vector(1).sha256


@contextmanager
def counted_queries(registry: Registry) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_connection, _cursor, statement, parameters, _context, _many) -> None:
        if not statement.startswith(("BEGIN", "COMMIT")):
            seen.append(statement)

    engine = registry._catalogue.engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def catalogue_many(registry: Registry, count: int) -> None:
    """Rows alone, in one transaction: a lookup does not care about blobs."""
    card = a_vector(0).card
    with registry._catalogue.writing() as connection:
        for number in range(count):
            draft = Draft("vector", f"filler-{number:05d}", f"{number:064x}", 1, card)
            registry._catalogue.insert(connection, draft)


@pytest.mark.parametrize("others", [10, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_lookup_is_one_indexed_query_however_many_there_are(
    registry: Registry, others: int
) -> None:
    catalogue_many(registry, others)
    registry.add("v", a_vector(1))
    with counted_queries(registry) as queries:
        registry.vector("v")
    assert len(queries) == 1
    with registry._catalogue.engine.connect() as connection:
        plan = connection.exec_driver_sql(
            "EXPLAIN QUERY PLAN " + queries[0], ("vector", "v", 1, 0)
        ).all()
    detail = " ".join(row[-1] for row in plan)
    assert "live_artefacts" in detail
    assert "SCAN" not in detail
    assert "TEMP B-TREE" not in detail
    with counted_queries(registry) as queries:
        for _ in range(100):
            registry.vector("v")
    assert queries == []
