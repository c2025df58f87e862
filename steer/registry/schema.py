"""The catalogue's tables, and how its SQLite connections are set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    text,
)

from steer.errors import StorageError

SCHEMA_VERSION = 1

metadata = MetaData()

artefacts = Table(
    "artefacts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("sha256", String, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("card", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("created_at", DateTime, nullable=False),  # UTC, without a zone
    # A removed row stays, so that a version number is never given out twice.
    Column("removed_at", DateTime),
    UniqueConstraint("kind", "name", "version"),
)
Index(
    "live_artefacts",
    artefacts.c.kind,
    artefacts.c.name,
    artefacts.c.version,
    sqlite_where=artefacts.c.removed_at.is_(None),
)
Index("artefacts_by_content", artefacts.c.sha256)

profiles = Table(
    "profiles",
    metadata,
    Column("name", String, primary_key=True),
    Column("profile", Text, nullable=False),
)


def open_database(path: Path) -> Engine:
    """An engine on the catalogue file, its tables made where they are missing.

    Transactions opened with the execution option `steer_write=True` take SQLite's write lock when
    they begin, so that what they read cannot change before they write.
    """
    engine = create_engine(f"sqlite:///{path}", pool_size=8, max_overflow=32)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    with engine.connect().execution_options(steer_write=True) as connection, connection.begin():
        found = connection.execute(text("PRAGMA user_version")).scalar_one()
        if found > SCHEMA_VERSION:
            raise StorageError(
                f"the catalogue {path} was written by a newer Steer (schema {found}; this one "
                f"reads up to {SCHEMA_VERSION}): upgrade Steer, or use another registry folder"
            )
        metadata.create_all(connection)
        connection.execute(text(f"PRAGMA user_version = {SCHEMA_VERSION}"))
    return engine


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # begin and commit are ours, not the driver's
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 30000")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    cursor.close()


def _begin(connection: Any) -> None:
    writes = connection.get_execution_options().get("steer_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
