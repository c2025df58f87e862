"""Calls of the workers that everybody who asks at about the same time shares."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from steer.errors import EngineError, SteerError

Asked = TypeVar("Asked")
Found = TypeVar("Found")

_MOST_DROPPED = 256


class SharedCalls(ABC, Generic[Asked, Found]):
    """Assumes: used from one event loop.

    Guarantees: at most one call is under way; a caller that goes away keeps nobody waiting.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Asked, asyncio.Future[Found]]] = []
        self._dropped: list[str] = []
        self._caller: asyncio.Task[None] | None = None

    @abstractmethod
    async def _answers(self, asked: Sequence[Asked], dropped: Sequence[str]) -> Sequence[Found]:
        """Calls the workers, who also forget what lies under the keys `dropped`; what was found
        for each of `asked`, in order."""

    @abstractmethod
    def _failure(self, error: Exception) -> SteerError:
        """What those who asked are told where the call fails."""

    def drop(self, key: str) -> None:
        """Nobody will ask for what `key` left; the workers forget it with the next call."""
        self._dropped.append(key)
        del self._dropped[:-_MOST_DROPPED]

    async def _joined(self, asked: Asked) -> Found:
        """What was found for `asked`, by a call that others may share."""
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._caller is None:
            self._caller = asyncio.create_task(self._call())
        return await future

    async def _call(self) -> None:
        try:
            # The outputs of one step wake their readers one after another: let them all ask.
            await asyncio.sleep(0)
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._serve(batch)
        finally:
            self._caller = None

    async def _serve(self, batch: list[tuple[Asked, asyncio.Future[Found]]]) -> None:
        dropped, self._dropped = self._dropped, []
        failure: SteerError = EngineError("no worker answered for this request")
        answers: Sequence[Found] = ()
        try:
            answers = await self._answers([asked for asked, _ in batch], dropped)
        except Exception as error:
            failure = self._failure(error)
            failure.__cause__ = error
        finally:
            for place, (_, future) in enumerate(batch):
                if future.done():
                    continue
                if place < len(answers):
                    future.set_result(answers[place])
                else:
                    future.set_exception(failure)
