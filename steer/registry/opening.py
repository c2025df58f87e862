"""Opening a registry's folder: its parts, and what dead writers left in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer.errors import StorageError, Unsupported
from steer.registry import locks
from steer.registry.blobs import BlobStore
from steer.registry.catalogue import Catalogue
from steer.registry.disk import disk_errors
from steer.registry.staging import Staging


@dataclass(frozen=True)
class Folder:
    """The parts of an open registry. `lock_file` is held shared while a blob is published and
    its row written, and exclusively while blobs are removed."""

    catalogue: Catalogue
    blobs: BlobStore
    staging: Staging
    lock_file: Path


def open_folder(location: str | Path) -> Folder:
    """The parts in the folder `location`, made where there are none and rid of leftovers."""
    root = _local_folder(location)
    lock_file = root / "registry.lock"
    with disk_errors("being opened"):
        (root / "staging").mkdir(parents=True, exist_ok=True)
        with locks.exclusive(lock_file):
            blobs = BlobStore(root / "blobs")
            catalogue = _open_catalogue(root, blobs)
            Staging.clean(root / "staging")
            _remove_orphans(catalogue, blobs)
            return Folder(catalogue, blobs, Staging(root / "staging"), lock_file)


def _local_folder(location: str | Path) -> Path:
    text = str(location)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    raise Unsupported(
        f"the registry location {text!r} is not a local folder: give a path or a file:// URL",
        code="unsupported_location",
    )


def _open_catalogue(root: Path, blobs: BlobStore) -> Catalogue:
    path = root / "catalogue.sqlite"
    if not path.exists() and next(blobs.names(), None) is not None:
        # Every blob would look like an orphan and be deleted.
        raise StorageError(
            f"{str(root)!r} holds artefacts but no catalogue.sqlite: restore that file, or choose "
            "an empty folder"
        )
    return Catalogue(path)


def _remove_orphans(catalogue: Catalogue, blobs: BlobStore) -> None:
    """Removes blobs whose row was never written. Assumes the exclusive lock."""
    with catalogue.reading() as connection:
        known = catalogue.contents(connection)
    for sha256 in list(blobs.names()):
        if sha256 not in known:
            blobs.remove(sha256)
