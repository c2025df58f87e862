"""A registry out to an archive, and an archive into a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from steer.registry.archive.archive import Exported, Reader, damaged, write_archive
from steer.registry.archive.merging import Imported, merge_rows, needed_blobs
from steer.registry.blobs.disk import disk_errors
from steer.registry.opening import Parts

Progress = Callable[[int], None]
"""Told the bytes of each blob when it has passed."""


def export_archive(parts: Parts, target: BinaryIO, progress: Progress) -> Exported:
    """Writes everything, as one moment saw it. Raises `StorageError`."""
    with disk_errors("writing an archive"):
        return write_archive(parts.catalogue, parts.blobs, parts.staging, target, progress)


def import_archive(parts: Parts, source: BinaryIO, progress: Progress) -> Imported:
    """Publishes every blob, then adds all rows in one transaction. Raises `FileFormatError`."""
    published = 0

    def keep(staged: Path, sha256: str) -> None:
        nonlocal published
        # Leased, because the row comes only when everything has arrived.
        parts.leases.hold(sha256)
        parts.blobs.publish(staged, sha256)
        published += 1

    with disk_errors("reading an archive"), parts.staging.temporary() as spool:
        Reader(source, parts.staging).read(spool, keep, progress)
        _check_arrived(parts, spool)
        with parts.catalogue.writing() as connection:
            done = merge_rows(parts.catalogue, connection, spool)
    done.blobs = published
    return done


def _check_arrived(parts: Parts, spool: Path) -> None:
    """Before the transaction, which should be short: the leases keep what is found here."""
    # A collection that looked before the leases were there has ended when this has its turn.
    with parts.catalogue.writing():
        pass
    for sha256, size, ref in needed_blobs(spool):
        parts.leases.take(sha256)
        if not parts.blobs.holds(sha256, size):
            raise damaged(f"the blob of {ref} is not in it")
