"""Brings a catalogue to the present schema, in the transaction of the caller."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from steer.errors import StorageError

FOLDER = Path(__file__).parent / "migrations"


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's configuration, for `connection` where there is one."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def known_revisions() -> list[str]:
    """Every revision that this Steer reads, oldest first."""
    scripts = ScriptDirectory.from_config(configuration())
    return [step.revision for step in reversed(list(scripts.walk_revisions()))]


def migrate(connection: Connection, found: str | None, place: str) -> None:
    """From the revision `found` (None: no tables yet) to the newest.

    Raises `StorageError` for a revision that this Steer does not know.
    """
    if found is not None and found not in known_revisions():
        raise newer_schema(place, found)
    command.upgrade(configuration(connection), "head")


def adopt_baseline(connection: Connection) -> None:
    """Says that the tables, made before there were migrations, are those of the first."""
    command.stamp(configuration(connection), known_revisions()[0])


def newer_schema(place: str, found: object) -> StorageError:
    """The error for a catalogue that this Steer is too old for."""
    return StorageError(
        f"the catalogue {place} was written by a newer Steer (schema {found}; this one reads up "
        f"to {known_revisions()[-1]}): upgrade Steer, or use another registry",
        code="newer_schema",
    )
