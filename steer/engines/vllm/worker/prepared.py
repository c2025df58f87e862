"""A forward pass made ready, and carried on while the same requests decode.

Between the arrivals and departures of requests a step differs from the one before in the positions
and, where a plan looks at token ids, in the slots of some tokens. So a pass is built once and then
carried on: what a carried step costs does not grow with what its requests ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from steer.batch.position_ledger import PositionLedger
from steer.batch.requests import Ints
from steer.engines.vllm.static.form import GraphPass
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.engines.vllm.worker.requests import Live


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass: request i computes `counts[i]` tokens, the first of them at
    position `starts[i]`. Requests lie behind one another in this order. `ids(i)` gives the tokens
    of one and is asked only where a plan reads them, before the pass: they may be on a device."""

    req_ids: Sequence[str]
    starts: Ints
    counts: Ints
    ids: Callable[[int], Ints]


@dataclass
class Placed:
    """A known request in the coming pass. `bits` are the passes that select its last token, kept
    where coming tokens may have others; `variants` are those of inline constants by such bits, and
    empty where the request is not steered by the compiled graph itself."""

    live: Live
    index: int
    offset: int
    start: int
    ids: Ints
    bits: int = field(default=0, init=False)
    variants: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.live.restless:
            self.bits = int(self.live.bits(self.start, self.ids)[-1])

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + len(self.ids))

    @property
    def settled(self) -> bool:
        """Whether what the coming tokens need depends on their ids alone."""
        live = self.live
        return not live.states and (live.plan is None or self.start >= live.settled_from)


@dataclass
class Prepared:
    """The step records the tokens of `rows` `[T]`; those of `inline` requests are recorded beside
    it, at `inline_places` with `inline_rows` and `inline_bits`."""

    placed: Sequence[Placed]
    rows: Ints
    positions: Ints
    inline: Sequence[Placed]
    inline_places: Ints
    inline_rows: Ints
    inline_bits: Ints
    running: ForwardPass | GraphPass | None

    def __post_init__(self) -> None:
        self._offsets = np.array([one.offset for one in self.placed], dtype=np.int64)
        self._indices = np.array([one.index for one in self.placed], dtype=np.int64)
        self._restless_inline = [
            (number, one) for number, one in enumerate(self.inline) if one.live.restless
        ]
        # Without a seat a request found no room: it is at fault, and nothing is edited for it.
        self._restless = [
            one
            for one in self.placed
            if one.live.restless and not one.variants and one.live.seat is not None
        ]

    def write_inline(self, ledger: PositionLedger) -> None:
        """Records the tokens that the compiled graph steered by itself."""
        if len(self.inline_places):
            positions = self.positions[self.inline_places]
            ledger.write(self.inline_rows, positions, self.inline_bits)

    def carry_on(self, batch: Batch, shifts: ShiftTables | None) -> bool:
        """Takes the same requests on by one token each; false where the pass must be built anew.

        Assumes: every request is `settled`, and was one token in this pass.
        """
        self.positions[self._offsets] = batch.starts[self._indices]
        for number, one in self._restless_inline:
            bits = one.live.bits_of(int(batch.ids(one.index)[0]))
            if bits != one.bits:
                variant = one.variants.get(bits)
                if variant is None or shifts is None:
                    return False
                one.bits = self.inline_bits[number] = bits
                shifts.change(one.offset, variant)
        changes: dict[int, Ints] = {}
        for one in self._restless:
            bits = one.live.bits_of(int(batch.ids(one.index)[0]))
            if bits != one.bits:
                one.bits = bits
                changes[one.offset] = _slots(one, bits)
        if isinstance(self.running, ForwardPass):
            self.running.carry_on(changes)
        return True


def _slots(placed: Placed, bits: int) -> Ints:
    """The slot `[P]` of the request's token in each pass that `bits` name."""
    seat, plan = placed.live.seat, placed.live.plan
    assert seat is not None
    assert plan is not None
    numbers = np.arange(len(plan.passes), dtype=np.int64)
    return (bits >> numbers & 1) * seat.slot
