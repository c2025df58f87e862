"""Read-outs fetched from the workers: all that are asked for at about the same time share one call,
so that a step in which many streams read costs one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from steer.engines.vllm.pipeline import readout_answers
from steer.errors import EngineError, SteerError

Asked = tuple[str, dict[int, int], bool]
"""A ticket's key, the tokens fed by each choice, and whether nobody asks again."""
Ask = Callable[[list[Asked]], Awaitable[list[Any]]]
"""Calls `steer_readouts` on all workers; the answers of each engine's, in order."""
Found = Mapping[int, list[Mapping[str, Any]]]
"""By choice, what the workers that ran it have read."""

_MOST_DROPPED = 256


class ReadoutFetcher:
    """Assumes: used from one event loop.

    Guarantees: at most one call is under way; a caller that goes away keeps nobody waiting.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._waiting: list[tuple[Asked, asyncio.Future[Found]]] = []
        self._dropped: list[str] = []
        self._caller: asyncio.Task[None] | None = None

    async def fetch(self, key: str, fed: Mapping[int, int], *, last: bool) -> Found:
        """What was read of the tokens in `fed` and not fetched before. Raises `EngineError`."""
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._waiting.append(((key, dict(fed), last), future))
        if self._caller is None:
            self._caller = asyncio.create_task(self._call())
        return await future

    def drop(self, key: str) -> None:
        """Nobody will ask for what was read under `key`; workers forget it with the next call."""
        self._dropped.append(key)
        del self._dropped[:-_MOST_DROPPED]

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
        asked = [one for one, _ in batch] + [(key, {}, True) for key in dropped]
        failure: SteerError | None = None
        answers: Sequence[Found] = ()
        try:
            answers = readout_answers(await self._ask(asked))
        except Exception as error:
            failure = EngineError(
                "the workers could not be asked what was read, so the answer is withheld "
                f"({type(error).__name__}): try again",
                code="readouts_missed",
            )
            failure.__cause__ = error
        for place, (_, future) in enumerate(batch):
            if future.done():
                continue
            if failure is None:
                future.set_result(answers[place])
            else:
                future.set_exception(failure)
