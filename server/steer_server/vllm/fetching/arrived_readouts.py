"""Read-outs that came on the engine's outputs, until whoever follows their request takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from steer.engines.vllm.internals import OUTPUTS
from steer.engines.vllm.messages import Arrival, read_readouts, take_readouts_off
from steer.engines.vllm.seams import check

Rows = list[tuple[int, tuple[float, ...]]]
"""Numbers by position, in order."""


@dataclass
class _Inbox:
    fed: int = 0
    arrivals: list[Arrival] = field(default_factory=list)
    held_back: Rows = field(default_factory=list)
    """Rows of tokens that whoever takes has not heard of yet."""


class ArrivedReadouts:
    """Assumes: used from the event loop of vLLM's client.

    Guarantees: what nobody expects is dropped when it comes.
    """

    def __init__(self) -> None:
        self._inboxes: dict[str, _Inbox] = {}

    def watch(self, output_processor: Any) -> None:
        """Takes what was read off all outputs that `output_processor`, vLLM's, is given."""
        check(*OUTPUTS)
        process = output_processor.process_outputs

        @wraps(process)
        def process_outputs(engine_core_outputs: Sequence[Any], *args: Any, **named: Any) -> Any:
            for output in engine_core_outputs:
                arrival = take_readouts_off(output)
                if arrival is not None:
                    self._put(arrival)
            return process(engine_core_outputs, *args, **named)

        output_processor.process_outputs = process_outputs

    def expect(self, key: str) -> None:
        """Keeps what comes under a ticket's `key` until it is forgotten."""
        self._inboxes[key] = _Inbox()

    def take(self, key: str, fed: int, width: int) -> Rows | None:
        """The rows of `width` numbers of the positions below `fed` that were not taken before; None
        where they do not come this way. Raises `EngineError` where they could not be read."""
        inbox = self._inboxes[key]
        if inbox.fed < fed:
            return None
        rows, arrivals, inbox.arrivals = inbox.held_back, inbox.arrivals, []
        for arrival in arrivals:
            rows += read_readouts(arrival.answers, width)
        # An output that vLLM has not handed on yet may have brought more.
        inbox.held_back = [row for row in rows if row[0] >= fed]
        return [row for row in rows if row[0] < fed]

    def forget(self, key: str) -> None:
        """Nobody follows this request any more."""
        self._inboxes.pop(key, None)

    def _put(self, arrival: Arrival) -> None:
        inbox = self._inboxes.get(arrival.key)
        if inbox is not None:
            inbox.fed = arrival.fed
            inbox.arrivals.append(arrival)
