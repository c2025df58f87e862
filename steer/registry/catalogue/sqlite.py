"""The catalogue in a SQLite file: one machine, many processes."""

from __future__ import annotations

import threading
from typing import Any

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import URL

from steer.errors import StorageError, Unsupported
from steer.registry.catalogue.database import WRITES, place_of, refuse_nul, revision_of
from steer.registry.catalogue.schema import HEAD

_FIRST = 1
"""`user_version` of the files made before there were migrations."""

_MARK = 2
"""`user_version` of all others: a Steer that knows no migrations refuses it as too new."""


class SqliteDatabase:
    """See `Database`. Writers take SQLite's write lock when they begin; changes are counted by
    SQLite itself, for a connection that never writes."""

    local = True

    def __init__(self, url: URL) -> None:
        if url.database in (None, "", ":memory:"):
            raise Unsupported(
                "a catalogue in memory is not shared by the registry's connections: give a file, "
                "sqlite:////folder/catalogue.sqlite",
                code="unsupported_catalogue",
            )
        self.engine = create_engine(url, pool_size=8, max_overflow=32)
        event.listen(self.engine, "connect", _configure)
        event.listen(self.engine, "begin", _begin)
        refuse_nul(self.engine)
        try:
            with (
                self.engine.connect().execution_options(**{WRITES: True}) as connection,
                connection.begin(),
            ):
                self.fresh = _bring_up_to_date(connection, place_of(url))
            self._watch_lock = threading.Lock()
            self._watch = self.engine.raw_connection()
        except BaseException:
            self.engine.dispose()
            raise

    def state(self) -> int:
        with self._watch_lock:
            cursor = self._watch.cursor()
            try:
                cursor.execute("PRAGMA data_version")
                row: Any = cursor.fetchone()
                return int(row[0])
            finally:
                cursor.close()

    def close(self) -> None:
        self._watch.close()
        self.engine.dispose()


def _bring_up_to_date(connection: Connection, place: str) -> bool:
    """Whether there were no tables. Everything, the mark included, is in the transaction."""
    revision = revision_of(connection)
    mark = connection.execute(text("PRAGMA user_version")).scalar_one()
    if revision == HEAD and mark == _MARK:
        return False
    from steer.registry.catalogue import migrating  # noqa: PLC0415 - Alembic is slow to import

    if mark > _MARK:
        raise migrating.newer_schema(place, mark)
    if revision is None and mark == 0 and inspect(connection).get_table_names():
        raise StorageError(f"{place} is a database of something else: name another file")
    if revision is None and mark == _FIRST:
        migrating.adopt_baseline(connection)
        revision = revision_of(connection)
    migrating.migrate(connection, revision, place)
    connection.execute(text(f"PRAGMA user_version = {_MARK}"))
    return revision is None


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # begin and commit are ours, not the driver's
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 30000")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    cursor.close()


def _begin(connection: Any) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
