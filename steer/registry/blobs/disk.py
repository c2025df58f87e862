"""Turns the operating system's errors about the registry's own files into `StorageError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from steer.errors import StorageError


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Raises an `OSError` inside as a `StorageError` that says it happened while `doing`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"the registry's folder failed while {doing}: {reason}") from error
