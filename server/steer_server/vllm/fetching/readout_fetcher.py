"""Read-outs fetched from the workers: a step in which many streams read costs one call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from steer.engines.vllm.pipeline import readout_answers
from steer.errors import EngineError
from steer_server.vllm.fetching.shared_calls import SharedCalls

Asked = tuple[str, dict[int, int], bool]
"""A ticket's key, the tokens fed by each choice, and whether nobody asks again."""
Ask = Callable[[list[Asked]], Awaitable[list[Any]]]
"""Calls `steer_readouts` on all workers; the answers of each engine's, in order."""
Found = Mapping[int, list[Mapping[str, Any]]]
"""By choice, what the workers that ran it have read."""


class ReadoutFetcher(SharedCalls[Asked, Found]):
    """What was read for each key."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self._ask = ask

    async def fetch(self, key: str, fed: Mapping[int, int], *, last: bool) -> Found:
        """What was read of the tokens in `fed` and not fetched before. Raises `EngineError`."""
        return await self._joined((key, dict(fed), last))

    async def _answers(self, asked: Sequence[Asked], dropped: Sequence[str]) -> Sequence[Found]:
        return readout_answers(await self._ask([*asked, *((key, {}, True) for key in dropped)]))

    def _failure(self, error: Exception) -> EngineError:
        return EngineError(
            "the workers could not be asked what was read, so the answer is withheld "
            f"({type(error).__name__}): try again",
            code="readouts_missed",
        )
