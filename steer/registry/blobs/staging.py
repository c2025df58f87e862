"""Where bytes wait until they are whole: one folder for each open registry, owned by a lock."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from steer.errors import TooLarge
from steer.registry.blobs.disk import disk_errors
from steer.registry.blobs.locks import Ownership, is_owned

_LOCK = "owner.lock"


@dataclass(frozen=True)
class WrittenFile:
    """A temporary file, the hash of its bytes and how many they are."""

    path: Path
    sha256: str
    size_bytes: int


class Staging:
    """A folder of temporary files of this process under `root`.

    Assumes: made and cleaned under the registry's exclusive lock.
    Guarantees: what a dead process left behind is recognised by its free lock, never by age.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = root / uuid.uuid4().hex
        self.folder.mkdir(parents=True)
        self._ownership = Ownership(self.folder / _LOCK)

    @staticmethod
    def clean(root: Path) -> int:
        """Removes the folders of dead processes under `root`; how many there were."""
        abandoned = [
            folder for folder in root.iterdir() if folder.is_dir() and not is_owned(folder / _LOCK)
        ]
        for folder in abandoned:
            shutil.rmtree(folder)
        return len(abandoned)

    def close(self) -> None:
        """Removes the folder. May be called twice."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._ownership.release()

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path for one file or folder, removed on exit whatever happens."""
        path = self.folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def written(self, pieces: Iterable[bytes]) -> Iterator[WrittenFile]:
        """A temporary file that holds `pieces`, one after the other, on the disk."""
        digest, size = hashlib.sha256(), 0
        with self.temporary() as path:
            with path.open("wb") as stream:
                for piece in pieces:
                    digest.update(piece)
                    size += len(piece)
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
            yield WrittenFile(path, digest.hexdigest(), size)


class Upload:
    """A file being received, in pieces, never more than one of them in memory.

    Use as a context manager; the file is gone on exit, so import it inside the block.
    """

    def __init__(self, staging: Staging, limit: int) -> None:
        self._place = staging.temporary()
        self._limit = limit
        self._stream: BinaryIO | None = None
        self._path: Path | None = None
        self.size = 0
        """Bytes received so far."""

    def __enter__(self) -> Upload:
        self._path = self._place.__enter__()
        self._stream = self._path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        finally:
            self._place.__exit__(kind, error, trace)

    @property
    def path(self) -> Path:
        """The file with all bytes received so far."""
        if self._path is None or self._stream is None:
            raise RuntimeError("an Upload is used inside its with block")
        with disk_errors("receiving an upload"):
            self._stream.flush()
        return self._path

    def write(self, chunk: bytes) -> None:
        """Appends `chunk`; raises `TooLarge` before the limit is passed."""
        if self._stream is None:
            raise RuntimeError("an Upload is used inside its with block")
        if self.size + len(chunk) > self._limit:
            raise TooLarge(
                f"the upload is larger than the limit of {self._limit} bytes: send a smaller "
                "file, or raise the server's upload limit",
                code="upload_too_large",
            )
        with disk_errors("receiving an upload"):
            self._stream.write(chunk)
        self.size += len(chunk)
