"""A running request as steering sees it, and the tokens of it that a pass computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from steer.plan.plan import Gate, Rule, SteeringPlan
from steer.plan.selection import Factors, factors_of, fixed_until
from steer.plan.texts.trace import TokenTrace

Ints = NDArray[np.int64]
NOBODY = -1
"""The row of a padding token."""


@dataclass(frozen=True)
class SteeredRequest:
    """A request that runs: its ledger row, its slot in the tables, where its prompt ends, and what
    its plan has to know of the tokens read so far."""

    row: int
    prompt_length: int
    plan: SteeringPlan | None = None
    slot: int = 0
    measure: bool = False
    trace: TokenTrace | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the plan; none where the request is not steered."""
        return () if self.plan is None else self.plan.rules

    @property
    def gated(self) -> bool:
        return self.plan is not None and self.plan.gated

    def slots(self, positions: Ints, tokens: Ints) -> Ints:
        """The slot of each token in each rule, `[P, T]`, gates apart; positions ascend."""
        if self.trace is not None and len(positions):
            self.trace.read(int(positions[0]), tokens)
        fixed = self._fixed
        if fixed is not None and len(positions) and positions[0] >= fixed[0]:
            return np.repeat(fixed[1], len(positions), axis=1)
        return self._masked(positions, tokens)

    def factors(self, positions: Ints) -> Factors | None:
        """The factor of each token `[P, T]` in each rule; None where the plan has no ramp."""
        if self.plan is None or not self.plan.ramped:
            return None
        return factors_of(self.plan.selections, positions, self.prompt_length)

    @cached_property
    def possible(self) -> Ints:
        """The slot of each rule `[P, 1]` where it is selected."""
        return np.full((len(self.rules), 1), self.slot, dtype=np.int64)

    def _masked(self, positions: Ints, tokens: Ints) -> Ints:
        out = np.zeros((len(self.rules), len(positions)), dtype=np.int64)
        for number, one in enumerate(self.rules):
            selected = one.selection.mask(positions, self.prompt_length, tokens, self.trace)
            out[number] = selected * self.slot
        return out

    @cached_property
    def _fixed(self) -> tuple[int, Ints] | None:
        """The position from which on slots stay as they are, and these slots `[P, 1]`."""
        bound = self.fixed_from
        if bound is None:
            return None
        return bound, self._masked(np.array([bound], dtype=np.int64), np.array([-1]))

    def watching(self, positions: Ints) -> Ints:
        """The slot of each token `[P, T]` that decides a prompt gate, or whose score it pools,
        whether selected or not: the last of the prompt."""
        held = [
            one.gate.last if one.gate is not None and one.gate.prompt_scope else 0
            for one in self.rules
        ]
        left = self.prompt_length - positions
        return ((left > 0) & (left <= np.array(held, dtype=np.int64)[:, None])) * self.slot

    @cached_property
    def pooling(self) -> tuple[tuple[int, Gate], ...]:
        """The gates that pool the scores of several tokens and are decided here, each with the
        number of its rule."""
        gates = ((number, one.gate) for number, one in enumerate(self.rules))
        return tuple((n, g) for n, g in gates if g is not None and g.pools and not g.elsewhere)

    @cached_property
    def onward(self) -> Ints:
        """The slot in each rule `[P, 1]` whose gate is onward, 0 in the others."""
        onward = [one.gate is not None and one.gate.onward for one in self.rules]
        return np.array(onward, dtype=np.int64)[:, None] * self.slot

    @property
    def fixed_from(self) -> int | None:
        """The position from which on `slots` no longer change; None where they may change for
        ever."""
        selections = [one.selection for one in self.rules]
        if any(selection.reads_tokens or selection.varies for selection in selections):
            return None
        return max((one.fixed_from(self.prompt_length) for one in selections), default=0)

    def fixed_until(self, position: int) -> int:
        """The position up to which generated tokens from `position` on have the slots of the one
        there, whatever they are; `position` where the next may have others, or it is the prompt's.
        """
        selections = [one.selection for one in self.rules]
        if any(selection.reads_tokens or selection.varies for selection in selections):
            return position
        return fixed_until(selections, position, self.prompt_length)


@dataclass(frozen=True)
class Span:
    """The tokens of one request in this pass: where they lie in the batch, and what they are."""

    request: SteeredRequest
    offset: int
    positions: Ints
    tokens: Ints

    @property
    def place(self) -> slice:
        """Where the tokens lie in the batch."""
        return slice(self.offset, self.offset + len(self.positions))
