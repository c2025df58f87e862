"""Advisory file locks between the processes that share a registry (POSIX `flock`).

The kernel drops a lock when its process ends, however it ends, so that a lock never outlives a
crash and needs no time-out.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Held together with other `shared` holders, never with an `exclusive` one."""
    with _held(path, fcntl.LOCK_SH):
        yield


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Held alone."""
    with _held(path, fcntl.LOCK_EX):
        yield


@contextmanager
def _held(path: Path, operation: int) -> Iterator[None]:
    # A descriptor of its own for each holder: flock then also works between threads.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


class Ownership:
    """A lock file held for as long as its owner lives."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_owned(path: Path) -> bool:
    """Whether a living process (this one included) holds the `Ownership` of `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
