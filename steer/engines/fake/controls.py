"""What a test does to the fake engine: hold it back token by token, and make it fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from steer.engines.base import GenerationRequest
from steer.errors import EngineError


class Stepper:
    """Lets tokens through one by one: `allow(3)` from any thread lets three out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._permits = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def allow(self, tokens: int = 1) -> None:
        """Lets `tokens` more tokens out, over all requests."""
        with self._lock:
            self._permits += tokens
            woken, self._waiting = self._waiting, []
        for loop, future in woken:
            loop.call_soon_threadsafe(_wake, future)

    async def wait(self) -> None:
        """Returns once a token may go out."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if self._permits:
                    self._permits -= 1
                    return
                future: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, future))
            await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _everybody(_: GenerationRequest) -> bool:
    return True


@dataclass(frozen=True)
class FakeFailure:
    """What goes wrong: raise `error` after `after` tokens of the requests that `of` is true for."""

    after: int = 0
    error: Exception = field(
        default_factory=lambda: EngineError("the fake engine was told to fail")
    )
    of: Callable[[GenerationRequest], bool] = _everybody
