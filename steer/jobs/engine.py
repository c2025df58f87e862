"""An engine as jobs see it: the same results, in small pieces, behind the requests of clients."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    Engine,
    EngineStats,
    GenerationRequest,
    QueriesKeys,
    TokenEvent,
)
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.engines.journal import bookmark_of, remembered
from steer.jobs.limits import JobLimits
from steer.jobs.pace import Pace
from steer.jobs.tokenizing import PacedTokenizer
from steer.model import HookPoint

T = TypeVar("T")

INTERLUDES = "interlude_seconds"
"""The engine's figure for the time that its thread spent on captures instead of decoding."""


class BackgroundEngine:
    """An `Engine` over another one, paced.

    A capture or a completion of many prompts is handed over piece by piece, and between two pieces
    requests have the engine to themselves (`Pace`). It is the other engine that is started and
    stopped.

    Assumes: used by one thread, which is the job's.
    """

    def __init__(self, engine: Engine, pace: Pace, limits: JobLimits) -> None:
        self._engine, self._pace, self._limits = engine, pace, limits
        self.info, self.capabilities = engine.info, engine.capabilities
        self.tokenizer: Any = PacedTokenizer(engine.tokenizer, pace)
        # Some engines have to ask their workers for figures, which is not to be done in vain.
        self._tells_interludes = INTERLUDES in engine.stats().extra

    def start(self) -> None:
        """Nothing to do: the server starts the engine."""

    def stop(self) -> None:
        """Nothing to do: the server stops the engine."""

    def admit(self, request: GenerationRequest) -> None:
        self._engine.admit(request)

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        return self._engine.generate(request)

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        for request in requests:
            self._engine.admit(request)
        found: list[Completion] = []
        while len(found) < len(requests):
            busy = self._pace.busy
            size = self._limits.busy_sequences if busy else self._limits.idle_sequences
            group = requests[len(found) : len(found) + size]
            others = self._pace.load()
            started = time.monotonic()
            found += self._engine.complete(group)
            # Of a step that many sequences share, this is the job's part.
            part = len(group) / (len(group) + others)
            self._pace.rest(part * (time.monotonic() - started))
        return found

    def capture(self, request: CaptureRequest) -> list[Captured]:
        found: list[Captured] = []
        lengths = [len(prompt) for prompt in request.prompts]
        while len(found) < len(lengths):
            tokens = self._limits.busy_tokens if self._pace.busy else self._limits.idle_tokens
            end = _fitting(lengths, len(found), tokens)
            part = request.of(range(len(found), end))
            found += self._timed(partial(self._engine.capture, part))
        return found

    def unembed(self, states: Tensor) -> Tensor:
        return self._timed(lambda: self._engine.unembed(states))

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        return self._timed(lambda: self._engine.token_rows(tokens))

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        return self._timed(lambda: self._engine.project(point, states))

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        return self._timed(lambda: self._engine.carry(source, target, states, channels))

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        return self._timed(lambda: self._engine.queries_and_keys(layer, states))

    def differentiate(self, work: Callable[[DifferentiableModel], T]) -> T:
        """The result of `work`, which is one piece; raises `Unsupported` without gradients."""
        engine = differentiable(self._engine)
        return self._timed(lambda: engine.differentiate(work))

    def recall(self, what: Any, work: Callable[[], Tensor]) -> Tensor:
        """See `remembered`; `work` is this engine's own business, piece by piece."""
        return remembered(self._engine, what, work)

    def bookmark(self, what: Any) -> Path | None:
        """See `bookmark_of`."""
        return bookmark_of(self._engine, what)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def _timed(self, work: Callable[[], T]) -> T:
        """The result of `work`, after which the job rests for as long as that is due.

        An engine that says how long its thread was kept from decoding is believed; otherwise the
        time counts during which the job waited, its wait for the step before it included.
        """
        read = self._interludes if self._tells_interludes else time.monotonic
        before = read()
        result = work()
        self._pace.rest(read() - before)
        return result

    def _interludes(self) -> float:
        return self._engine.stats().extra[INTERLUDES]


def _fitting(lengths: Sequence[int], first: int, tokens: int) -> int:
    """The end of the longest run of prompts from `first` within `tokens` tokens; at least one."""
    end, total = first, 0
    for length in lengths[first:]:
        total += length
        if end > first and total > tokens:
            break
        end += 1
    return end
