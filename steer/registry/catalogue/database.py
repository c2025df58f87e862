"""What the catalogue needs of a database, which each kind of database does in its own way."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import Connection, Engine, inspect, select, text
from sqlalchemy.engine import URL

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
