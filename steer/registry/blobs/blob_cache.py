"""Copies of remote blobs on this machine's disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LIMIT = 16 << 30


class BlobCache:
    """Files by hash in `folder`, the least recently used removed over `limit_bytes`.

    Guarantees: a file appears whole or not at all; many processes may share the folder. What is in
    it may be removed at any time; a file already opened stays readable.
    """

    def __init__(self, folder: Path, limit_bytes: int = _LIMIT) -> None:
        self.folder = folder
        self._limit = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, sha256: str) -> Path | None:
        """The copy, marked as used; None where there is none."""
        path = self.folder / sha256
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def fill(self, sha256: str, fetch: Callable[[Path], None]) -> Path:
        """The copy that `fetch` writes to the path it is given, whole and checked."""
        partial = self.folder / f"{uuid.uuid4().hex}.partial"
        path = self.folder / sha256
        try:
            fetch(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._shrink(keep=path)
        return path

    def drop(self, sha256: str) -> None:
        """Forgets a copy, such as one that is damaged."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _shrink(self, keep: Path) -> None:
        held = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process shrinks as well
                found = entry.stat()
                held.append((found.st_mtime, found.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total <= self._limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
