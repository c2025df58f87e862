"""Leases: which blobs processes may still read by their hash, whatever becomes of their names.

A worker reads an SAE by the hash in a plan, and a plan outlives the name it was compiled from by as
long as its request runs. Whoever loads a blob leases it; garbage collection leaves it alone until
the lease has run out. Leases are small objects beside the blobs, because workers have no catalogue.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from steer.errors import StorageError
from steer.registry.blobs.blobs import open_filesystem, store_errors

LEASE_SECONDS = 6 * 3600
"""How long a lease lasts."""

RENEWED_SECONDS = 3600
"""How often the lease of a blob in use is renewed: one that is used lasts 5 hours at least."""

_REMEMBERED = 65_536
log = logging.getLogger("steer.registry")


class Leases:
    """Leases under `location`, one object for each blob that holds the time when it ends.

    Guarantees: safe from any thread and process; taking a lease again within the hour costs a look
    into a dictionary.
    """

    def __init__(self, location: str, *, clock: Callable[[], float] = time.time) -> None:
        self._fs, self._root = open_filesystem(location)
        self.local = isinstance(self._fs, LocalFileSystem)
        """Whether leases are files of this machine."""
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: OrderedDict[str, float] = OrderedDict()

    def take(self, sha256: str) -> None:
        """Keeps the blob from being collected for `LEASE_SECONDS`.

        A lease that cannot be written is logged and no more: the blob can be read, and the grace
        period of garbage collection protects it as well.
        """
        now = self._clock()
        with self._lock:
            taken = self._taken.get(sha256)
            if taken is not None and 0 <= now - taken < RENEWED_SECONDS:
                return
        try:
            self.hold(sha256)
        except (OSError, StorageError) as error:
            log.warning("the blob %s could not be leased: %s", sha256[:12], error)
        with self._lock:
            self._taken[sha256] = now
            self._taken.move_to_end(sha256)
            while len(self._taken) > _REMEMBERED:
                self._taken.popitem(last=False)

    def hold(self, sha256: str) -> None:
        """As `take`, at once and in any case; raises where it cannot be written."""
        until = str(self._clock() + LEASE_SECONDS).encode()
        path = self._path(sha256)
        with store_errors("leasing a blob"):
            if not self.local:
                self._fs.pipe_file(path, until)
                return
        # A lease is read as a whole, so it is never half written.
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f"{uuid.uuid4().hex}.partial")
        try:
            staged.write_bytes(until)
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

    def is_held(self, sha256: str) -> bool:
        """Whether somebody's lease of the blob has not run out."""
        try:
            with store_errors("reading a lease"):
                until = float(self._fs.cat_file(self._path(sha256)))
        except FileNotFoundError:
            return False
        except ValueError:
            return True  # not ours to judge: it goes when somebody removes it
        return self._clock() < until

    def drop(self, sha256: str) -> None:
        """Ends the lease of a blob that is gone."""
        with suppress(FileNotFoundError), store_errors("ending a lease"):
            self._fs.rm_file(self._path(sha256))
        with self._lock:
            self._taken.pop(sha256, None)

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256}"
