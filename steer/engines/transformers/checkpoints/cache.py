"""Folders that are made once and kept in this machine's cache: models fetched or converted.

A folder appears under its name when it is whole, by a rename. Whoever makes one holds a lock, so
that two processes never make the same folder; what a process that was killed has left is swept
away by the next. The cache may be emptied at any time: what is missing is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from steer.errors import StorageError
from steer.registry.blobs.locks import exclusive, is_owned
from steer.registry.location import CACHE_VARIABLE, cache_folder

_PART = ".part"
_PIECE = 1 << 22

Say = Callable[[str], None]
"""Tells the user one line about work that takes a while."""


def tell(line: str) -> None:
    """`Say` on stderr, where it disturbs no output."""
    print(line, file=sys.stderr, flush=True)


def models_folder() -> Path:
    """Where models that were fetched or converted lie."""
    return cache_folder() / "models"


def made_once(folder: Path, make: Callable[[Path], None], say: Say = tell) -> Path:
    """`folder`, which `make` has filled now or at an earlier time.

    `make` gets an empty folder beside it, which becomes `folder` when it returns. Raises what
    `make` raises, and `StorageError` where the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    part, lock = folder.with_name(folder.name + _PART), folder.with_name(folder.name + ".lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if is_owned(lock):
            say(f"waiting for another process that makes {folder}")
        with exclusive(lock):
            if not folder.is_dir():
                _make(folder, part, make)
    except OSError as error:
        raise StorageError(
            f"{str(folder)!r} cannot be written ({error.strerror or error}): make room or give "
            f"rights there, or name another cache in the environment variable {CACHE_VARIABLE}",
            code="cache_not_writable",
        ) from error
    return folder


def _make(folder: Path, part: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        make(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """`sha256_of` a file, read again only where its place, size or time of change is another."""
    place, stat = path.resolve(), path.stat()
    state = [str(place), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = models_folder() / "sums" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
    try:
        noted = json.loads(note.read_text())
        if noted["state"] == state:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = sha256_of(path)
    _write_note(note, {"state": state, "sha256": found})
    return found


def _write_note(note: Path, content: dict[str, object]) -> None:
    # It only saves time: a cache that cannot be written is told of where it matters.
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_name(f"{note.name}.{os.getpid()}")
        part.write_text(json.dumps(content))
        part.replace(note)
    except OSError:
        pass
