"""From the engine's thread to whoever waits: an asyncio task, or a thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Protocol

from steer.engines.base import Completion, TokenEvent, TokenLogprob
from steer.engines.readouts import joined
from steer.errors import SteerError

Item = TokenEvent | SteerError


class Mailbox:
    """One per event loop: gathers what a step produced and wakes the loop once.

    A wake-up costs a system call, so 64 streams share it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: list[tuple[asyncio.Queue[Item], Item]] = []

    def post(self, target: asyncio.Queue[Item], item: Item) -> None:
        self._pending.append((target, item))

    def flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            # A loop that was closed has nobody left who waits.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(_deliver, pending)


def _deliver(items: list[tuple[asyncio.Queue[Item], Item]]) -> None:
    for target, item in items:
        target.put_nowait(item)


class Listener(Protocol):
    """Where a request's tokens go. Called from the engine's thread."""

    def put(self, event: TokenEvent) -> None: ...

    def fail(self, error: SteerError) -> None: ...

    def flush(self) -> None:
        """Called once after each step that put something."""


class AsyncListener:
    """Delivers into an `asyncio.Queue` of the loop it was made in."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self._mailbox = mailbox

    def put(self, event: TokenEvent) -> None:
        self._mailbox.post(self.queue, event)

    def fail(self, error: SteerError) -> None:
        self._mailbox.post(self.queue, error)

    def flush(self) -> None:
        self._mailbox.flush()


class BlockingListener:
    """Collects a whole completion; `result` waits for it."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._error: SteerError | None = None
        self._done = threading.Event()

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if event.finish:
            self._done.set()

    def fail(self, error: SteerError) -> None:
        self._error = error
        self._done.set()

    def flush(self) -> None:
        """Nothing to do: the waiting thread is woken by the last event."""

    def result(self) -> Completion:
        self._done.wait()
        if self._error is not None:
            raise self._error
        last = self._events[-1]
        kept = self._events if last.finish in (None, "length") else self._events[:-1]
        logprobs: tuple[TokenLogprob, ...] = tuple(e.logprob for e in kept if e.logprob)
        return Completion(
            tuple(e.token for e in kept),
            last.finish or "length",
            last.receipt,
            logprobs,
            joined(one for event in self._events for one in event.readouts),
        )
