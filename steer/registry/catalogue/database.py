"""What the catalogue needs of a database, which each kind of database does in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event, inspect, select, text
from sqlalchemy.engine import URL

from steer.errors import SteerError, quoted
from steer.registry.catalogue.schema import state

WRITES = "steer_write"
"""The execution option of a connection whose next transaction writes."""


class Database(Protocol):
    """Guarantees: a transaction with the option `WRITES` is alone among such from its beginning to
    its end, in all processes; one without sees one state; the schema is the present one."""

    engine: Engine
    fresh: bool
    """Whether opening it made its tables."""
    local: bool
    """Whether it is a file of this machine, so that `state` waits for no other."""

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


def refuse_nul(engine: Engine) -> None:
    """Has `engine` raise `SteerError` (`invalid_value`) for a text with the character NUL, in what
    is asked for and in what is stored: PostgreSQL has no such texts, and catalogues move."""
    event.listen(engine, "before_cursor_execute", _refuse_nul)


def _refuse_nul(
    _connection: Any, _cursor: Any, _statement: str, parameters: Any, _context: Any, many: bool
) -> None:
    for row in parameters if many else (parameters,):
        values: Iterable[Any] = row.values() if isinstance(row, Mapping) else row or ()
        for value in values:
            if isinstance(value, str) and "\0" in value:
                raise SteerError(
                    f"{quoted(value)} holds the character NUL, which no name or text here has: "
                    "leave it out",
                    code="invalid_value",
                )
