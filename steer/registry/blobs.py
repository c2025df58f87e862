"""Content-addressed blobs in a folder, through fsspec.

A blob's name is the sha256 of its bytes, `blobs/ab/abcdef…`, so that it never changes once it is
there and two writers of the same content cannot disagree. A blob appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from steer.errors import StorageError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """Blobs under `location`, a folder or any URL that fsspec opens.

    Guarantees: `publish` is atomic and, on a local disk, durable when it returns; without
    `durable` a crash of the machine may lose or damage what was published last.
    """

    def __init__(self, location: str | Path, *, durable: bool = True) -> None:
        filesystem, root = url_to_fs(str(location))
        self._fs = cast(AbstractFileSystem, filesystem)
        self._root = str(root).rstrip("/")
        self._local = isinstance(filesystem, LocalFileSystem)
        self._durable = durable
        self._fs.makedirs(self._root, exist_ok=True)

    @property
    def folder(self) -> Path | None:
        """The folder of the blobs on a local disk; None elsewhere."""
        return Path(self._root) if self._local else None

    def local_path(self, sha256: str) -> Path | None:
        """Where the blob lies, or would lie, on a local disk; None elsewhere."""
        return Path(self._path(sha256)) if self._local else None

    def publish(self, staged: Path, sha256: str) -> None:
        """Moves the finished file `staged`, whose bytes hash to `sha256`, to its place."""
        target = self._path(sha256)
        parent = target.rsplit("/", 1)[0]
        self._fs.makedirs(parent, exist_ok=True)
        if self._local:
            os.replace(staged, target)
            if self._durable:
                _sync_folder(Path(parent))
                _sync_folder(Path(self._root))
        else:
            self._fs.put_file(str(staged), target)
            staged.unlink()

    def read(self, sha256: str) -> bytes:
        """The blob's bytes, checked against its name."""
        with self.open(sha256) as stream:
            data = stream.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                f"the blob {sha256[:12]} is damaged: its bytes no longer match its hash. Upload "
                "the artefact again to repair it",
                code="damaged_blob",
            )
        return data

    def open(self, sha256: str) -> IO[bytes]:
        """The blob as an open file."""
        try:
            return cast(IO[bytes], self._fs.open(self._path(sha256), "rb"))
        except FileNotFoundError:
            raise StorageError(
                f"the blob {sha256[:12]} is catalogued but not in {self._root}: upload the "
                "artefact again to repair it",
                code="missing_blob",
            ) from None

    def remove(self, sha256: str) -> None:
        """Deletes the blob; a file already opened for reading stays readable."""
        path = self._path(sha256)
        if self._fs.exists(path):
            self._fs.rm_file(path)

    def names(self) -> Iterator[str]:
        """The hashes of all blobs."""
        self._fs.invalidate_cache()
        found: list[Any] = self._fs.find(self._root)
        for path in found:
            name = str(path).rsplit("/", 1)[-1]
            if _SHA256.fullmatch(name):
                yield name

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name is written.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
