"""Content-addressed blobs in a folder or an object store, through fsspec.

A blob's name is the sha256 of its bytes, `blobs/ab/abcdef…`, so that it never changes once it is
there and two writers of the same content cannot disagree. On a disk a blob appears whole or not at
all. In a store it is sent under its final name: object stores publish an object when it is
complete, and where a store does not, the size tells.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from steer.errors import StorageError, Unsupported
from steer.registry.blobs.blob_cache import BlobCache
from steer.registry.location import cache_folder, local_folder

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20


class BlobStore:
    """Blobs under `location`, a folder or any URL that fsspec opens; what a store needs to know
    beside its URL (endpoint, credentials) is in fsspec's configuration or the environment.

    Guarantees: `publish` is idempotent and durable when it returns; without `durable` a crash of
    the machine may lose or damage what was published last to a local disk. With `cache`, remote
    blobs are read from this machine after the first time.
    """

    def __init__(
        self, location: str | Path, *, durable: bool = True, cache: BlobCache | None = None
    ) -> None:
        self._fs, self._root = open_filesystem(str(location))
        self._local = isinstance(self._fs, LocalFileSystem)
        self._durable = durable
        self._cache = None if self._local else cache
        if self._local:
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
        if self._local:
            parent = Path(target).parent
            parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, target)
            if self._durable:
                sync_folder(parent)
                sync_folder(Path(self._root))
            return
        size = staged.stat().st_size
        with store_errors(f"storing the blob {sha256[:12]}"):
            self._fs.put_file(str(staged), target)
        if not self.holds(sha256, size):
            raise StorageError(
                f"the blob {sha256[:12]} was sent to the registry's store, and what is there is "
                f"not {size} bytes long: try again"
            )
        staged.unlink()

    def holds(self, sha256: str, size_bytes: int) -> bool:
        """Whether the blob is there in its full size; its bytes are checked when it is read."""
        try:
            with store_errors(f"looking for the blob {sha256[:12]}"):
                return int(self._fs.info(self._path(sha256))["size"]) == size_bytes
        except FileNotFoundError:
            return False

    def read(self, sha256: str) -> bytes:
        """The blob's bytes, checked against its name."""
        with self.open_unchecked(sha256) as stream:
            data = stream.read()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        with self._fetched_again(sha256) as stream:
            return stream.read()

    def open(self, sha256: str) -> IO[bytes]:
        """The blob as an open file whose bytes have been checked against its name: it is read
        through once, without being held in memory, before anything of it is given out."""
        stream = self.open_unchecked(sha256)
        try:
            if _digest(stream) == sha256:
                stream.seek(0)
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()
        return self._fetched_again(sha256)

    def size(self, sha256: str) -> int:
        """The blob's bytes."""
        with self.open_unchecked(sha256) as stream:
            return stream.seek(0, os.SEEK_END)

    def open_unchecked(self, sha256: str) -> IO[bytes]:
        """The blob as an open file, for those who check its bytes as they pass."""
        if self._cache is not None:
            copy = self._cache.find(sha256) or self._fetched(sha256, self._cache)
            try:
                return copy.open("rb")
            except FileNotFoundError:  # removed since
                return self._fetched(sha256, self._cache).open("rb")
        return self._open_original(sha256)

    def remove(self, sha256: str) -> None:
        """Deletes the blob; a file already opened on a disk stays readable."""
        try:
            with store_errors(f"removing the blob {sha256[:12]}"):
                self._fs.rm_file(self._path(sha256))
        except FileNotFoundError:
            pass
        if self._cache is not None:
            self._cache.drop(sha256)

    def names(self) -> Iterator[str]:
        """The hashes of all blobs."""
        self._fs.invalidate_cache()
        with store_errors("listing the blobs"):
            found: list[Any] = self._fs.find(self._root)
        for path in found:
            name = str(path).rsplit("/", 1)[-1]
            if _SHA256.fullmatch(name):
                yield name

    def age(self, sha256: str) -> float:
        """Seconds since the blob was last published; 0 where the store does not tell."""
        try:
            with store_errors(f"looking for the blob {sha256[:12]}"):
                changed: datetime = self._fs.modified(self._path(sha256))
        except (FileNotFoundError, NotImplementedError):
            return 0.0
        return time.time() - changed.timestamp()

    def _fetched_again(self, sha256: str) -> IO[bytes]:
        """In the place of bytes that are not the blob's, where they were a copy; a blob that is
        fetched is checked."""
        if self._cache is None:
            raise _damaged(sha256)
        self._cache.drop(sha256)
        return self._fetched(sha256, self._cache).open("rb")

    def _open_original(self, sha256: str) -> IO[bytes]:
        try:
            with store_errors(f"reading the blob {sha256[:12]}"):
                return cast(IO[bytes], self._fs.open(self._path(sha256), "rb"))
        except FileNotFoundError:
            raise StorageError(
                f"the blob {sha256[:12]} is catalogued but not among the registry's blobs: "
                "upload the artefact again to repair it",
                code="missing_blob",
            ) from None

    def _fetched(self, sha256: str, cache: BlobCache) -> Path:
        def fetch(path: Path) -> None:
            digest = hashlib.sha256()
            with (
                self._open_original(sha256) as source,
                path.open("wb") as target,
                store_errors(f"reading the blob {sha256[:12]}"),
            ):
                while block := source.read(_BLOCK):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != sha256:
                raise _damaged(sha256)

        return cache.fill(sha256, fetch)

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


def blobs_at(root: str) -> BlobStore:
    """The blobs of the registry at `root`, with copies on this machine where they are elsewhere."""
    cache = None if local_folder(root) is not None else BlobCache(cache_folder() / "blobs")
    return BlobStore(f"{root}/blobs", cache=cache)


def open_filesystem(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `location`, and its path there.

    Raises `Unsupported` for a scheme that nothing installed knows.
    """
    try:
        # What is listed is what is there now: other machines write here as well.
        options = {"use_listings_cache": False} if "://" in location else {}
        filesystem, root = url_to_fs(location, **options)
    except (ImportError, ValueError) as error:
        scheme = location.partition("://")[0]
        raise Unsupported(
            f"the registry location has the scheme {scheme!r}, which cannot be opened ({error}): "
            "install its package (for s3:// pip install 'steer-llm[s3]'), or give a folder",
            code="unsupported_location",
        ) from error
    return cast(AbstractFileSystem, filesystem), str(root).rstrip("/")


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """What a store's client raises, as `StorageError`; `OSError` passes as it is."""
    try:
        yield
    except (OSError, NotImplementedError, StorageError):
        raise
    except Exception as error:  # every client has errors of its own
        raise StorageError(
            f"the registry's store failed while {doing}: {type(error).__name__}: {error}"
        ) from error


def sync_folder(folder: Path) -> None:
    """A rename is durable only once the folder that holds the name is written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _damaged(sha256: str) -> StorageError:
    return StorageError(
        f"the blob {sha256[:12]} is damaged: its bytes no longer match its hash. Upload the "
        "artefact again to repair it",
        code="damaged_blob",
    )
