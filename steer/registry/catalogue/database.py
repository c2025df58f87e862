"""What the catalogue needs of a database, which each kind of database does in its own way."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import Connection, Engine, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from steer.errors import StorageError, Unsupported
from steer.registry.catalogue.schema import state

WRITES = "steer_write"
"""The execution option of a connection whose next transaction writes."""


class Database(Protocol):
    """Guarantees: a transaction with the option `WRITES` is alone among such from its beginning to
    its end, in all processes; one without sees one state; the schema is the present one."""

    engine: Engine
    fresh: bool
    """Whether opening it made its tables."""

    def state(self) -> int:
        """A number that changes whenever a commit of any process changes rows."""

    def close(self) -> None: ...


def open_database(url: str) -> Database:
    """The catalogue at the SQLAlchemy URL, with its schema brought up to date.

    Raises `Unsupported` for other databases than SQLite and PostgreSQL, `StorageError` for one
    that cannot be used or was written by a newer Steer.
    """
    parsed = _parsed(url)
    kind = parsed.get_backend_name()
    try:
        if kind == "sqlite":
            from steer.registry.catalogue.sqlite import SqliteDatabase  # noqa: PLC0415 - one of them

            return SqliteDatabase(parsed)
        if kind == "postgresql":
            from steer.registry.catalogue.postgresql import PostgresDatabase  # noqa: PLC0415

            return PostgresDatabase(parsed)
    except SQLAlchemyError as error:
        raise StorageError(f"the catalogue {place_of(parsed)} failed: {error}") from error
    except ModuleNotFoundError as error:
        raise Unsupported(
            f"the catalogue {place_of(parsed)} needs the package {error.name!r}: "
            "pip install 'steer-llm[postgres]'",
            code="driver_missing",
        ) from error
    raise Unsupported(
        f"a catalogue in {kind!r} is not supported: give a URL that begins with sqlite:/// or "
        "postgresql+psycopg://",
        code="unsupported_catalogue",
    )


def place_of(url: URL) -> str:
    """How a message names the catalogue; never with its password."""
    return repr(url.render_as_string(hide_password=True))


def revision_of(connection: Connection) -> str | None:
    """The catalogue's revision; None where Alembic has never been."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def identity_of(connection: Connection) -> str:
    """What tells this catalogue from all others."""
    found: str = connection.execute(select(state.c.identity)).scalar_one()
    return found


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        # Not the text itself: it may hold a password.
        raise Unsupported(
            "the catalogue is not a SQLAlchemy URL: give one such as "
            "postgresql+psycopg://user@host/database or sqlite:////folder/catalogue.sqlite",
            code="unsupported_catalogue",
        ) from None
