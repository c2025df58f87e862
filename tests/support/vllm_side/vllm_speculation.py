"""Engines that speculate, for tests, and what vLLM itself counts of their drafts.

Import this module before vllm, as `vllm_engine`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_simulation import core

from steer.engines.base import SpeculationReceipt
from steer.engines.vllm.core.cache_keys import ticket_of
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.front.sequences import RunningSequence

DRAFTS = 3
NGRAM: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
"""Drafts what followed the last tokens when they stood there before: much, and mostly wrong."""


@dataclass
class Drafts:
    """What vLLM's scheduler counted, by the name of the request that was steered."""

    verified: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """For each pass that chose tokens how many drafts there were, and how many stayed."""
    names: dict[str, str] = field(default_factory=dict)
    """The request of each ticket."""

    def of(self, name: str) -> list[tuple[int, int]]:
        keys = [key for key, other in self.names.items() if other == name]
        return [one for key in keys for one in self.verified.get(key, ())]

    @property
    def total(self) -> SpeculationReceipt:
        every = [one for found in self.verified.values() for one in found]
        return SpeculationReceipt(sum(d for d, _ in every), sum(a for _, a in every))


@contextmanager
def counted_drafts(engine: VllmEngine) -> Iterator[Drafts]:
    """Watches the scheduler while it is open."""
    drafts, scheduler, close = Drafts(), core(engine).scheduler, RunningSequence.close
    make, update = scheduler.make_spec_decoding_stats, scheduler._update_request_with_output
    counted: dict[str, tuple[int, int]] = {}

    def make_watched(stats: Any, **named: Any) -> Any:
        counts = named["num_draft_tokens"], named["num_accepted_tokens"]
        counted[named["request_id"]] = counts
        return make(stats, **named)

    def update_watched(request: Any, *args: Any, **named: Any) -> Any:
        ticket, counts = ticket_of(request), counted.pop(request.request_id, (0, 0))
        if ticket is not None:
            drafts.verified[ticket.key].append(counts)
        return update(request, *args, **named)

    def close_watched(self: RunningSequence, answer: Any) -> None:
        if self.ticket is not None:
            drafts.names[self.ticket.key] = self.request.id
        close(self, answer)

    scheduler.make_spec_decoding_stats = make_watched
    scheduler._update_request_with_output = update_watched
    RunningSequence.close = close_watched  # type: ignore[method-assign]
    try:
        yield drafts
    finally:
        del scheduler.make_spec_decoding_stats, scheduler._update_request_with_output
        RunningSequence.close = close  # type: ignore[method-assign]
