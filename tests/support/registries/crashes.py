"""Processes that die at any step of an operation on a registry.

Within `Mortal`, everything that changes a disk, a store or a database is a step: renames,
deletions, syncs, new folders, objects sent or deleted, statements that write, commits. At the
chosen step, just before or just after it, `Died` is raised, and from then on every further step
raises it as well, so that no clean-up happens: what a dead process would have left is left. Locks
and connections are given up as the kernel would give them up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem
from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

from steer.registry.entry import Ref
from steer.registry.registry import Registry

_DISK = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync")
_STORE = ("put_file", "pipe_file", "rm_file")
_READS = ("SELECT", "BEGIN", "SET")


class Died(BaseException):
    """The process is dead."""


class Mortal:
    """Dies at step `at` (counted from 0), before or after it is done."""

    def __init__(self, at: int, *, after: bool) -> None:
        self._at, self._after = at, after
        self.steps: list[str] = []
        self.dead = False

    @contextmanager
    def living(self, filesystems: list[AbstractFileSystem] = []) -> Iterator[None]:  # noqa: B006
        """The operation goes inside; `filesystems` are those of remote blobs."""
        undo: list[Callable[[], None]] = []

        def patch(owner: Any, name: str, label: str) -> None:
            had, real = name in vars(owner), getattr(owner, name)

            def mortal(*args: Any, **kwargs: Any) -> Any:
                return self._step(label, lambda: real(*args, **kwargs))

            setattr(owner, name, mortal)
            undo.append(lambda: setattr(owner, name, real) if had else delattr(owner, name))

        def statement(_c: Any, _cursor: Any, text: str, *_rest: Any) -> None:
            start = text.lstrip().upper()
            asks = start.startswith("PRAGMA") and "=" not in start
            if not asks and not start.startswith(_READS):
                self._step(text.split("\n", maxsplit=1)[0][:50], lambda: None)

        for name in _DISK:
            patch(os, name, name)
        for filesystem in filesystems:
            for name in _STORE:
                patch(filesystem, name, name)
        real_commit = DefaultDialect.do_commit

        def commit(dialect: Any, connection: Any) -> None:
            self._step("commit", lambda: real_commit(dialect, connection))

        DefaultDialect.do_commit = commit
        event.listen(Engine, "before_cursor_execute", statement)
        try:
            yield
        finally:
            event.remove(Engine, "before_cursor_execute", statement)
            DefaultDialect.do_commit = real_commit
            for back in reversed(undo):
                back()

    def _step(self, label: str, real: Callable[[], Any]) -> Any:
        if self.dead:
            raise Died
        here = len(self.steps) == self._at
        self.steps.append(label)
        if here and not self._after:
            self.dead = True
            raise Died
        try:
            return real()
        finally:
            if here:  # also where the step failed by itself, such as a folder that was there
                self.dead = True
                raise Died


def bury(registry: Registry) -> None:
    """What the kernel does when the process of `registry` has died: nothing on disk changes."""
    registry._staging._ownership.release()
    registry._catalogue.close()


def observed(registry: Registry) -> dict[str, Any]:
    """Everything that a user can see; every blob is read and checked on the way."""
    live = registry.entries(limit=10_000)
    removed = registry.entries(limit=10_000, deleted=True)
    seen: dict[str, Any] = {"live": [], "removed": []}
    for entry in live:
        for one in registry.versions(entry.kind, entry.name):
            data = registry._blobs.read(one.sha256)
            assert hashlib.sha256(data).hexdigest() == one.sha256
            seen["live"].append((one.kind, one.name, one.version, one.sha256))
    with registry._catalogue.reading() as connection:
        for entry in removed:
            for one in registry._catalogue.removed(connection, entry.kind, Ref(entry.name)):
                assert registry._blobs.holds(one.sha256, one.size_bytes), "cannot be restored"
                seen["removed"].append((one.kind, one.name, one.version, one.sha256))
    seen["profiles"] = registry.profiles()
    seen["aliases"] = registry.aliases()
    names = [entry.name for entry in (*live, *removed)]
    seen["tags"] = {kind: registry.tags(kind, names) for kind in ("vector", "sae", "low_rank")}
    return seen
