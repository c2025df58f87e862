"""Compiled plans by content hash, for the processes that run them.

The process that compiles a plan puts its bytes here once; every worker gets them by their hash.
The store lies beside a registry, in `<location>/plans`, and reads SAEs from `<location>/blobs`.
It holds bytes and does not look into them: `steer.plan.file` does. Plans are a cache: each can be
compiled again, so nothing here waits for a disk.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import utime
from pathlib import Path
from typing import IO, TypeVar

from steer.artefacts.lens import Lens
from steer.artefacts.sae.base import SAE
from steer.errors import SteerError, StorageError, TooLarge
from steer.registry.blobs import locks
from steer.registry.blobs.blobs import BlobStore, blobs_at
from steer.registry.blobs.caches import LoadedCache
from steer.registry.blobs.disk import disk_errors
from steer.registry.blobs.leases import Leases

TOUCH_SECONDS = 3600
"""How often a plan in use has its time of use renewed."""

_MAX_PLAN = 256 << 20
_CACHE_BYTES = 1 << 30
_REMEMBERED = 65_536
_SHA256 = re.compile(r"[0-9a-f]{64}")

Held = TypeVar("Held")


class PlanStore:
    """Plans and SAEs under `location`, a folder or any URL that fsspec opens.

    Assumes: the registry whose SAEs the plans name is at the same `location`.
    Guarantees: a plan appears whole or not at all; every method may be called from any thread,
    and from many processes at once; `get` returns the bytes that were put, or raises.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        cache_bytes: int = _CACHE_BYTES,
        max_plan_bytes: int = _MAX_PLAN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        root = str(location).rstrip("/")
        with disk_errors("the plan store was opened"):
            self._plans = BlobStore(f"{root}/plans", durable=False)
            self._blobs = blobs_at(root)
            self._leases = Leases(f"{root}/leases")
        self._max_plan_bytes = max_plan_bytes
        self._clock = clock
        self._used: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()
        self._saes: LoadedCache[str, SAE] = LoadedCache(cache_bytes)

    def put(self, data: bytes) -> str:
        """Stores a plan's bytes, unless they are here; their sha256.

        Raises `TooLarge`, or `StorageError` where the folder fails.
        """
        if len(data) > self._max_plan_bytes:
            raise TooLarge(
                f"the plan has {len(data)} bytes; at most {self._max_plan_bytes} are stored: edit "
                "fewer hook points",
                code="plan_too_large",
            )
        sha256 = hashlib.sha256(data).hexdigest()
        if not self._is_fresh(sha256):
            with disk_errors("storing a plan"), self._unpruned():
                if not self._holds(sha256):
                    self._publish(data, sha256)
                self._touch(sha256)
        return sha256

    def get(self, sha256: str) -> bytes:
        """The plan with this hash; raises `StorageError` (`missing_plan`, `damaged_plan`)."""
        _check_hash(sha256)
        try:
            with disk_errors("reading a plan"):
                data = self._plans.read(sha256)
        except StorageError as error:
            raise self._unreadable(sha256, error) from error
        if not self._is_fresh(sha256):
            # A worker may only be able to read here; whoever put the plan renews it too.
            with suppress(OSError):
                self._touch(sha256)
        return data

    def sae(self, sha256: str) -> SAE:
        """A registered SAE, whose rows stay in its file where there are many.

        Kept open, the least recently used dropped over `cache_bytes` of what lies in memory; it is
        shared and must not be changed. Raises `StorageError` for a hash that is not
        here, `FileFormatError` for one that is no SAE's.
        """
        self._lease(sha256)  # also for one that is held already
        return self._saes.get(
            sha256,
            SAE.resident_bytes,
            lambda: self._read(
                sha256, lambda stream: SAE.from_file(stream, sha256=sha256), "reading an SAE"
            ),
        )

    def lens(self, sha256: str) -> Lens:
        """A registered tuned lens. Raises as `sae` does."""
        self._lease(sha256)
        return self._read(sha256, lambda stream: Lens.from_bytes(stream.read()), "reading a lens")

    def _lease(self, sha256: str) -> None:
        # Those who put the plan have leased it already; a worker that only reads need not.
        _check_hash(sha256)
        self._leases.take(sha256)

    def _read(self, sha256: str, read: Callable[[IO[bytes]], Held], doing: str) -> Held:
        with disk_errors(doing), self._blobs.open(sha256) as stream:
            return read(stream)

    def prune(self, older_than_seconds: float, now: float | None = None) -> int:
        """Removes plans last used more than `older_than_seconds` before `now`; how many.

        Times of use are exact to `TOUCH_SECONDS`, so that less than twice that is refused. Does
        nothing outside local disks: give an object store a lifecycle rule instead.
        """
        if older_than_seconds < 2 * TOUCH_SECONDS:
            raise SteerError(
                f"plans used in the last {older_than_seconds} seconds may be in use: keep them for "
                f"{2 * TOUCH_SECONDS} seconds or more",
                code="invalid_age",
            )
        folder = self._plans.folder
        if folder is None:
            return 0
        oldest = (self._clock() if now is None else now) - older_than_seconds
        with disk_errors("pruning plans"), locks.exclusive(_lock_file(folder)):
            # What a process that died was about to publish lies here too.
            old = [
                path
                for path in folder.glob("*/*")
                if path.is_file() and path.stat().st_mtime < oldest
            ]
            for path in old:
                path.unlink()
        with self._lock:
            for path in old:
                self._used.pop(path.name, None)
        return sum(_SHA256.fullmatch(path.name) is not None for path in old)

    def _holds(self, sha256: str) -> bool:
        """Whether the plan is here and sound: one damaged in a crash is written again."""
        try:
            self._plans.read(sha256)
        except StorageError:
            return False
        return True

    def _publish(self, data: bytes, sha256: str) -> None:
        folder = self._plans.folder
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="steer-plan-") as scratch:
                staged = Path(scratch) / sha256
                staged.write_bytes(data)
                self._plans.publish(staged, sha256)
            return
        # In the same folder, for only within one file system a rename is atomic.
        staged = folder / "staging" / uuid.uuid4().hex
        staged.parent.mkdir(exist_ok=True)
        try:
            staged.write_bytes(data)
            self._plans.publish(staged, sha256)
        finally:
            staged.unlink(missing_ok=True)

    def _is_fresh(self, sha256: str) -> bool:
        """Whether this process has used the plan lately; its time of use needs no renewal."""
        with self._lock:
            used = self._used.get(sha256)
            if used is None or not 0 <= self._clock() - used < TOUCH_SECONDS:
                return False
            self._used.move_to_end(sha256)
            return True

    def _touch(self, sha256: str) -> None:
        now = self._clock()
        path = self._plans.local_path(sha256)
        if path is not None:
            utime(path, (now, now))
        with self._lock:
            self._used[sha256] = now
            self._used.move_to_end(sha256)
            while len(self._used) > _REMEMBERED:
                self._used.popitem(last=False)

    @contextmanager
    def _unpruned(self) -> Iterator[None]:
        """Within, nobody prunes: a plan found here is here until it has been touched."""
        folder = self._plans.folder
        if folder is None:
            yield
            return
        with locks.shared(_lock_file(folder)):
            yield

    def _unreadable(self, sha256: str, error: StorageError) -> StorageError:
        if error.code == "missing_blob":
            return StorageError(
                f"the plan {sha256[:12]} is not in the plan store: give every process of the "
                "server the same registry location, on storage that they share",
                code="missing_plan",
            )
        if error.code == "damaged_blob":
            return StorageError(
                f"the plan {sha256[:12]} in the plan store is damaged: its bytes no longer match "
                "its hash. Restart the server, which writes it again when it is next used",
                code="damaged_plan",
            )
        return error


def _check_hash(sha256: str) -> None:
    if not _SHA256.fullmatch(sha256):
        raise StorageError(f"{sha256!r} is not a sha256 in 64 hex digits", code="invalid_hash")


def _lock_file(folder: Path) -> Path:
    return folder / "prune.lock"
