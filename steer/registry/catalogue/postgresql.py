"""The catalogue in PostgreSQL: many machines."""

from __future__ import annotations

import threading
from typing import Any

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from steer.errors import StorageError
from steer.registry.catalogue.database import WRITES, place_of, refuse_nul, revision_of
from steer.registry.catalogue.schema import HEAD

_OPENING = 0x5354_4545_5200_0001
"""The advisory lock of those who look at the schema, and may change it."""

_WAIT = "30s"
"""How long a writer waits for another one; SQLite's catalogue waits as long."""


class PostgresDatabase:
    """See `Database`. Writers lock the row of `registry_state` when they begin, and count it up in
    the transaction that changes rows: whoever sees the changes sees the number, and the reverse.
    """

    local = False

    def __init__(self, url: URL) -> None:
        # Connections that the server has closed meanwhile are found before they are used.
        self.engine = create_engine(url, pool_size=8, max_overflow=32, pool_pre_ping=True)
        event.listen(self.engine, "connect", _configure)
        event.listen(self.engine, "begin", _begin)
        refuse_nul(self.engine)
        self._watch_lock = threading.Lock()
        self._watch: Connection | None = None
        try:
            with self.engine.connect() as connection, connection.begin():
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_OPENING})"))
                self.fresh = _bring_up_to_date(connection, place_of(url))
            self.state()
        except BaseException:
            self.engine.dispose()
            raise

    def state(self) -> int:
        with self._watch_lock:
            try:
                return self._number()
            except DBAPIError:
                # The server may have been restarted: once more, over a new connection.
                self._drop_watch()
                return self._number()

    def close(self) -> None:
        with self._watch_lock:
            self._drop_watch()
        self.engine.dispose()

    def _number(self) -> int:
        if self._watch is None:
            self._watch = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        number = self._watch.exec_driver_sql("SELECT number FROM registry_state").scalar_one()
        return int(number)

    def _drop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.invalidate()
            watch.close()


def _bring_up_to_date(connection: Connection, place: str) -> bool:
    """Whether there were no tables. Assumes the lock; everything is in the transaction."""
    revision = revision_of(connection)
    if revision == HEAD:
        return False
    from steer.registry.catalogue import migrating  # noqa: PLC0415 - Alembic is slow to import

    if revision is None and inspect(connection).has_table("artefacts"):
        raise StorageError(
            f"{place} has a table 'artefacts' of something else: name another database or schema"
        )
    migrating.migrate(connection, revision, place)
    return revision is None


def _configure(connection: Any, _record: Any) -> None:
    before = connection.autocommit
    connection.autocommit = True
    connection.execute(f"SET lock_timeout = '{_WAIT}'")
    connection.autocommit = before


def _begin(connection: Any) -> None:
    writes = connection.get_execution_options().get(WRITES)
    if writes is None:
        return
    if writes:
        # Statements after this one see what the writer before has committed.
        connection.exec_driver_sql("UPDATE registry_state SET number = number + 1")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
