"""Where a registry is: a folder, or a URL for its blobs with another for its catalogue."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steer.errors import Unsupported

CATALOGUE_FILE = "catalogue.sqlite"
CATALOGUE_VARIABLE = "STEER_CATALOGUE"
"""The environment variable with the catalogue's SQLAlchemy URL. There is no argument for it: the
URL may hold a password, and arguments can be read by every user of a machine."""
CACHE_VARIABLE = "STEER_CACHE"
"""The environment variable with the folder for copies of remote blobs."""


@dataclass(frozen=True)
class Location:
    """`root` is the folder or URL under which `blobs`, `plans` and `leases` are; `folder` is set
    where it is on a local disk. `catalogue` is a SQLAlchemy URL."""

    root: str
    folder: Path | None
    catalogue: str

    @property
    def own_catalogue(self) -> Path | None:
        """The catalogue's file where it is the folder's own; None where it is elsewhere."""
        if self.folder is None or self.catalogue != _own_catalogue(self.folder):
            return None
        return self.folder / CATALOGUE_FILE

    @property
    def work(self) -> Path:
        """A folder on this machine for files that are being received."""
        return self.folder if self.folder is not None else cache_folder()


def chosen_catalogue(environment: Mapping[str, str]) -> str | None:
    """The catalogue's URL in the environment of a command or server; None where it has none."""
    return environment.get(CATALOGUE_VARIABLE) or None


def locate(location: str | Path, catalogue: str | None = None) -> Location:
    """A folder (or `file://` URL) needs no `catalogue`: it is a SQLite file in that folder.

    Raises `Unsupported` for another URL without one: a catalogue needs a disk or a server.
    """
    root = str(location).rstrip("/") or "/"
    folder = local_folder(root)
    if catalogue:
        return Location(root, folder, catalogue)
    if folder is None:
        raise Unsupported(
            f"the registry at {root!r} needs a catalogue: put the SQLAlchemy URL of a PostgreSQL "
            f"database into the environment variable {CATALOGUE_VARIABLE} (or that of a SQLite "
            "file, where one machine alone uses it), or name a local folder as the registry",
            code="unsupported_location",
        )
    return Location(root, folder, _own_catalogue(folder))


def _own_catalogue(folder: Path) -> str:
    return f"sqlite:///{folder / CATALOGUE_FILE}"


def local_folder(location: str) -> Path | None:
    """The folder that `location` names; None for a URL of something else."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location)
    return Path(rest) if scheme == "file" else None


def cache_folder() -> Path:
    """This machine's folder for copies of remote blobs, and for what is being received.

    `STEER_CACHE`, or the user's cache folder, or where that cannot be written a temporary one.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "steer"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"steer-{os.getuid()}"
    return (
        home if os.access(home, os.W_OK) else Path(tempfile.gettempdir()) / f"steer-{os.getuid()}"
    )
