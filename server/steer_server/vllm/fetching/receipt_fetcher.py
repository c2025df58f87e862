"""Receipts fetched from the workers: those asked for at about the same time share one call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from steer.engines.base import Receipt
from steer.engines.vllm.messages import leaves_unsteered, read_receipt
from steer.engines.vllm.pipeline import gathered_answers
from steer.errors import EngineError
from steer_server.vllm.fetching.shared_calls import SharedCalls

Asked = tuple[str, dict[int, int]]
"""A ticket's key, and the tokens fed by each choice."""
Ask = Callable[[list[Asked]], Awaitable[list[Any]]]
"""Calls `steer_receipts` on all workers; the answers of each engine's, in order."""


class ReceiptFetcher(SharedCalls[Asked, Mapping[int, Any]]):
    """What was applied for each key."""

    def __init__(self, ask: Ask, cleanse: Callable[[], Awaitable[object]] | None = None) -> None:
        """`cleanse` empties the prefix cache: states of a request that was not steered may lie
        in it under its plan's name."""
        super().__init__()
        self._ask, self._cleanse = ask, cleanse

    async def fetch(self, key: str, fed: Mapping[int, int]) -> list[Receipt]:
        """The receipts of the choices in `fed` (tokens fed by each), in order.

        Raises `EngineError` where one of them cannot be had, `NotFinite` where the steering of one
        ran over.
        """
        answer = await self._joined((key, dict(fed)))
        missing = {"error": "no worker answered for this choice"}
        return [read_receipt(answer.get(choice, missing)) for choice in sorted(fed)]

    async def received(self, answer: Mapping[str, Any]) -> list[Receipt]:
        """The receipt in an answer that came without a call; raises as `fetch` does."""
        if leaves_unsteered(answer) and self._cleanse is not None:
            await self._cleanse()
        return [read_receipt(answer)]

    async def _answers(
        self, asked: Sequence[Asked], dropped: Sequence[str]
    ) -> Sequence[Mapping[int, Any]]:
        answers = gathered_answers(await self._ask([*asked, *((key, {}) for key in dropped)]))
        unsteered = any(leaves_unsteered(one) for found in answers for one in found.values())
        if unsteered and self._cleanse is not None:
            await self._cleanse()
        return answers

    def _failure(self, error: Exception) -> EngineError:
        return EngineError(
            "the workers could not be asked what was applied, so the answer is withheld "
            f"({type(error).__name__}): try again"
        )
