"""A real PostgreSQL and an object store, both started here, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import ObjectStore, running_store
from postgres_server import PostgresServer, running_postgres, server_programs


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    try:
        server_programs()
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    with running_store() as running:
        yield running


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of remote blobs go into the test's own folder."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
