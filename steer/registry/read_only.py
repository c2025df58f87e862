"""A registry on a disk that cannot be written, such as an image's or a mounted snapshot.

SQLite cannot open a database with a log (WAL) there. So its catalogue is read from a copy, which
also takes schema changes; artefacts are read where they are, and every change is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from steer.registry.blobs.blobs import blobs_at
from steer.registry.blobs.disk import disk_errors
from steer.registry.blobs.leases import Leases
from steer.registry.blobs.staging import Staging
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.location import CATALOGUE_FILE, Location
from steer.registry.opening import Parts, open_database

_LOG = "-wal"


def is_read_only(location: Location) -> bool:
    """Whether `location` is a registry with a catalogue of its own that nobody can write here."""
    own = location.own_catalogue
    return own is not None and own.is_file() and not os.access(own.parent, os.W_OK)


def open_read_only(location: Location) -> Parts:
    """The parts at `location`, over a copy of its catalogue. Raises `StorageError`."""
    assert location.folder is not None
    copy = Path(tempfile.mkdtemp(prefix="steer-registry-"))
    try:
        with disk_errors("being opened for reading"):
            for suffix in ("", _LOG):
                source = location.folder / (CATALOGUE_FILE + suffix)
                if source.is_file():
                    shutil.copyfile(source, copy / source.name)
            database = open_database(f"sqlite:///{copy / CATALOGUE_FILE}")
            catalogue = Catalogue(
                database,
                read_only=f"the registry {location.root!r} is on a disk that cannot be written: "
                "name another one to change something",
            )
            return Parts(
                Location(location.root, copy, location.catalogue),
                catalogue,
                blobs_at(location.root),
                Leases(f"{copy}/leases"),
                Staging(copy / "staging"),
                temporary=copy,
            )
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
