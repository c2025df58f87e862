"""Constant additions in static buffers: the part of steering that a compiled graph does inline.

A *variant* is what a token of one plan adds, for one choice of the rules that select it. A token
names its variant, the variant names a row of the bank at each tap, and row 0 is −0.0. When a pass
is made ready, each token gets its row at each tap. So the graph needs one gather and one addition
per tap, whatever the number of specs in the batch.

V variants, R bank rows, B the most tokens in a batch, d the width of the stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from steer.model import INNER_SITES, HookPoint
from steer.plan.plan import SteeringPlan

Key = tuple[str, int]
"""A plan's fingerprint, and the rules that select the token, as bits."""


@dataclass
class _Variant:
    number: int
    rows: list[int]


class ShiftTables:
    """Assumes: written between forward passes, by one thread.

    Guarantees: variant 0 adds −0.0 everywhere; a variant that `keep` protects is never rewritten.
    """

    def __init__(
        self,
        taps: int,
        width: int,
        *,
        variants: int,
        bank_rows: int,
        batch_tokens: int,
        device: torch.device,
    ) -> None:
        self.token_rows = torch.zeros(taps, batch_tokens, dtype=torch.long, device=device)
        """The bank row of each token at each tap: what the graph reads."""
        self._rows = torch.zeros(taps, variants, dtype=torch.long, device=device)
        self.bank = torch.full((bank_rows, width), -0.0, device=device)
        self._held: OrderedDict[Key, _Variant] = OrderedDict()
        self._free = list(range(variants - 1, 0, -1))
        self._free_rows = list(range(bank_rows - 1, 0, -1))
        self._written = 0

    def find(
        self,
        plan: SteeringPlan,
        selected: int,
        tap_of: Callable[[HookPoint], int],
        keep: Set[Key],
    ) -> int | None:
        """The variant of `plan` for the rules `selected`; None where there is no room beside those
        in `keep`."""
        if selected == 0:
            return 0
        key = (plan.fingerprint, selected)
        held = self._held.get(key)
        if held is None:
            held = self._write(key, summed(plan, selected, tap_of), keep)
            if held is None:
                return None
        self._held.move_to_end(key)
        return held.number

    def carries(self, plan: SteeringPlan) -> bool:
        """Whether the compiled graph can do all that `plan` asks for."""
        return only_shifts(plan)

    def assign(self, variants: Tensor) -> None:
        """Names the variant of each token `[T]` of the next pass; the rest of the batch adds
        nothing."""
        tokens = len(variants)
        self.token_rows[:, :tokens] = self._rows.index_select(1, variants.to(self._rows.device))
        if tokens < self._written:
            self.token_rows[:, tokens : self._written] = 0
        self._written = tokens

    def change(self, place: int, variant: int) -> None:
        """Names the variant of one token of the next pass, the others being as they were."""
        self.token_rows[:, place] = self._rows[:, variant]

    def rest(self) -> None:
        """No token of the next pass adds anything."""
        if self._written:
            self.token_rows[:, : self._written] = 0
            self._written = 0

    def clear(self) -> None:
        """Forgets every variant."""
        while self._evict(frozenset()):
            pass
        self.rest()

    def _write(self, key: Key, sums: Mapping[int, Tensor], keep: Set[Key]) -> _Variant | None:
        while not self._free or len(self._free_rows) < len(sums):
            if not self._evict(keep):
                return None
        variant = _Variant(self._free.pop(), [])
        for tap, shift in sums.items():
            row = self._free_rows.pop()
            self.bank[row] = shift.to(self.bank)
            self._rows[tap, variant.number] = row
            variant.rows.append(row)
        self._held[key] = variant
        return variant

    def _evict(self, keep: Set[Key]) -> bool:
        """Gives back the least recently used variant outside `keep`."""
        oldest = next((key for key in self._held if key not in keep), None)
        if oldest is None:
            return False
        gone = self._held.pop(oldest)
        self._rows[:, gone.number] = 0
        self._free.append(gone.number)
        self._free_rows.extend(gone.rows)
        return True


class NoShifts:
    """The shifts of an engine without a compiled graph: it has none but adding nothing."""

    def carries(self, plan: SteeringPlan) -> bool:  # noqa: ARG002
        return False

    def find(
        self,
        plan: SteeringPlan,  # noqa: ARG002
        selected: int,
        tap_of: Callable[[HookPoint], int],  # noqa: ARG002
        keep: Set[Key],  # noqa: ARG002
    ) -> int | None:
        return 0 if selected == 0 else None

    def assign(self, variants: Tensor) -> None: ...

    def change(self, place: int, variant: int) -> None: ...

    def rest(self) -> None: ...

    def clear(self) -> None: ...


Shifts: TypeAlias = ShiftTables | NoShifts
"""What a worker's compiled graph adds by itself."""


def only_shifts(plan: SteeringPlan) -> bool:
    """Whether all that `plan` ever does is to add constants to the stream of tokens known
    beforehand: inside attention and MLP a graph has no constants, and under a ramp an edit is none.
    """
    return not plan.ramped and all(
        one.gate is None
        and all(
            block.is_shift and point.site not in INNER_SITES for point, block in one.blocks.items()
        )
        for one in plan.rules
    )


def summed(
    plan: SteeringPlan, selected: int, tap_of: Callable[[HookPoint], int]
) -> dict[int, Tensor]:
    """What a token that the rules `selected` select adds at each tap, float32 `[d]`."""
    sums: dict[int, Tensor] = {}
    for number, one in enumerate(plan.rules):
        if selected >> number & 1:
            for point, block in one.blocks.items():
                if block.shift is not None:
                    tap = tap_of(point)
                    sums[tap] = sums[tap] + block.shift if tap in sums else block.shift
    return sums
