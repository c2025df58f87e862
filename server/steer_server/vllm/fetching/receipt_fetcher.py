"""Receipts fetched from the workers: those asked for at about the same time share one call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from steer.engines.base import Receipt
from steer.engines.vllm.messages import leaves_unsteered, read_receipt
from steer.engines.vllm.pipeline import gathered_answers
from steer.errors import EngineError

Ask = Callable[[list[tuple[str, dict[int, int]]]], Awaitable[list[Any]]]
"""Calls `steer_receipts` on all workers; the answers of each engine's, in order."""

_MOST_DROPPED = 256


@dataclass
class _Waiting:
    key: str
    fed: dict[int, int]
    future: asyncio.Future[Mapping[int, Any]]


class ReceiptFetcher:
    """Assumes: used from one event loop.

    Guarantees: at most one call is under way; a caller that goes away keeps nobody waiting.
    """

    def __init__(self, ask: Ask, cleanse: Callable[[], Awaitable[object]] | None = None) -> None:
        """`cleanse` empties the prefix cache: states of a request that was not steered may lie
        in it under its plan's name."""
        self._ask, self._cleanse = ask, cleanse
        self._waiting: list[_Waiting] = []
        self._dropped: list[str] = []
        self._caller: asyncio.Task[None] | None = None

    async def fetch(self, key: str, fed: Mapping[int, int]) -> list[Receipt]:
        """The receipts of the choices in `fed` (tokens fed by each), in order.

        Raises `EngineError` where one of them cannot be had, `NotFinite` where the steering of one
        ran over.
        """
        future: asyncio.Future[Mapping[int, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(key, dict(fed), future))
        if self._caller is None:
            self._caller = asyncio.create_task(self._call())
        answer = await future
        missing = {"error": "no worker answered for this choice"}
        return [read_receipt(answer.get(choice, missing)) for choice in sorted(fed)]

    async def received(self, answer: Mapping[str, Any]) -> list[Receipt]:
        """The receipt in an answer that came without a call; raises as `fetch` does."""
        if leaves_unsteered(answer) and self._cleanse is not None:
            await self._cleanse()
        return [read_receipt(answer)]

    def drop(self, key: str) -> None:
        """Nobody will ask for what `key` left; the workers forget it with the next call."""
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

    async def _serve(self, batch: list[_Waiting]) -> None:
        dropped, self._dropped = self._dropped, []
        asked = [(one.key, one.fed) for one in batch]
        try:
            engines = await self._ask([*asked, *((key, {}) for key in dropped)])
            answers = gathered_answers(engines)
            unsteered = any(leaves_unsteered(one) for found in answers for one in found.values())
            if unsteered and self._cleanse is not None:
                await self._cleanse()
            for one, answer in zip(batch, answers, strict=False):
                if not one.future.done():
                    one.future.set_result(answer)
        except Exception as error:
            failure = EngineError(
                f"the workers could not be asked what was applied, so the answer is withheld "
                f"({type(error).__name__}): try again"
            )
            failure.__cause__ = error
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(failure)
        finally:
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(EngineError("no worker answered for this request"))
