"""Opening a registry: its parts, and what dead writers left in them."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from steer.errors import StorageError, Unsupported
from steer.registry.blobs import locks
from steer.registry.blobs.blobs import (
    BlobStore,
    blobs_at,
    open_filesystem,
    store_errors,
    sync_folder,
)
from steer.registry.blobs.disk import disk_errors
from steer.registry.blobs.garbage import remove_orphans
from steer.registry.blobs.leases import Leases
from steer.registry.blobs.staging import Staging
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.catalogue.database import Database, place_of
from steer.registry.catalogue.schema import artefacts
from steer.registry.location import CATALOGUE_FILE, Location

MARKER = "registry.json"


@dataclass(frozen=True)
class Parts:
    """The parts of an open registry."""

    location: Location
    catalogue: Catalogue
    blobs: BlobStore
    leases: Leases
    staging: Staging
    temporary: Path | None = None
    """A folder that is theirs alone."""

    def close(self) -> None:
        """Releases files, locks and connections."""
        self.staging.close()
        self.catalogue.close()
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)


def open_parts(location: Location) -> Parts:
    """The parts at `location`, made where there are none and rid of leftovers."""
    work = location.work
    with disk_errors("being opened"):
        (work / "staging").mkdir(parents=True, exist_ok=True)
        with locks.exclusive(work / "registry.lock"):
            blobs = blobs_at(location.root)
            _refuse_lost_catalogue(location, blobs)
            catalogue = Catalogue(open_database(location.catalogue))
            try:
                _check_identity(location, catalogue, blobs)
                leases = Leases(f"{location.root}/leases")
                Staging.clean(work / "staging")
                if blobs.folder is not None:
                    # In a store it would be a long look at start; garbage collection does it.
                    remove_orphans(catalogue, blobs, leases, min_age=0)
                staging = Staging(work / "staging")
            except BaseException:
                catalogue.close()
                raise
            return Parts(location, catalogue, blobs, leases, staging)


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


def _refuse_lost_catalogue(location: Location, blobs: BlobStore) -> None:
    own = location.own_catalogue
    if own is None or own.exists():
        return
    if next(blobs.names(), None) is not None:
        # Every blob would look like an orphan and be deleted.
        raise StorageError(
            f"{location.root!r} holds artefacts but no {CATALOGUE_FILE}: restore that file, name "
            "the catalogue they belong to, or choose an empty folder"
        )


def _check_identity(location: Location, catalogue: Catalogue, blobs: BlobStore) -> None:
    """Catalogue and blobs belong together: one that ruled the blobs of another would delete them.

    Raises `StorageError` (`wrong_catalogue`).
    """
    identity = catalogue.identity()
    found = _marker(location)
    if found is None:
        # Made by a Steer before there were markers, or new.
        has_blobs = next(blobs.names(), None) is not None
        if has_blobs and not _has_rows(catalogue) and location.own_catalogue is None:
            raise _wrong_catalogue(location)
        _mark(location, identity)
    elif found != identity:
        raise _wrong_catalogue(location)


def _has_rows(catalogue: Catalogue) -> bool:
    with catalogue.reading() as connection:
        return connection.execute(select(artefacts.c.id).limit(1)).first() is not None


def _wrong_catalogue(location: Location) -> StorageError:
    return StorageError(
        f"the artefacts in {location.root!r} belong to another catalogue than the one given: name "
        "their own, or another place for the artefacts",
        code="wrong_catalogue",
    )


def _marker(location: Location) -> str | None:
    filesystem, root = open_filesystem(location.root)
    try:
        with store_errors("reading its marker"):
            text = filesystem.cat_file(f"{root}/{MARKER}")
        return str(json.loads(text)["identity"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{location.root}/{MARKER} is damaged ({error}): restore it, or remove it where you "
            "know that the catalogue belongs to these artefacts"
        ) from error


def _mark(location: Location, identity: str) -> None:
    data = json.dumps({"identity": identity}).encode()
    filesystem, root = open_filesystem(location.root)
    if location.folder is None:
        with store_errors("writing its marker"):
            filesystem.pipe_file(f"{root}/{MARKER}", data)
        return
    partial = location.folder / f"{MARKER}.partial"
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(location.folder / MARKER)
        sync_folder(location.folder)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


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
