"""What was really applied to the requests that run: the source of their receipts."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.requests import NOBODY, Ints
from steer.batch.tables import MAX_RULES
from steer.model import HookPoint

_LOOKED_AT = 256
"""Positions that are looked at together."""
UNSEEN = 0xFFFF
"""Marks a position that no pass has computed."""


class Ledger:
    """What was applied to each request row, and the decisions that its gates hold.

    `tokens[row, applied]` counts the tokens that the rules named by `applied` edited.
    Assumes: a row is reset before a request takes it.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.tokens = np.zeros((rows, 1 << MAX_RULES), dtype=np.int64)
        self.gate_open = torch.zeros(rows, MAX_RULES, dtype=torch.bool, device=device)
        self.gate_value = torch.full((rows, MAX_RULES), float("nan"), device=device)
        self.relative: dict[HookPoint, Tensor] = {}

    def reset(self, row: int) -> None:
        self.tokens[row] = 0
        self.gate_open[row] = False
        self.gate_value[row] = float("nan")
        for sums in self.relative.values():
            sums[row] = 0.0

    def record(self, rows: Ints, applied: Ints) -> None:
        """Counts tokens `[T]` of `rows` that the rules named by `applied` edited."""
        # One flat index: numpy adds at several ten times more slowly.
        np.add.at(self.tokens.reshape(-1), rows * self.tokens.shape[1] + applied, 1)

    def recount(self, row: int) -> None:
        """Counts a row from zero again, because its tokens are computed anew; its gates' decisions
        stand."""
        self.tokens[row] = 0
        for sums in self.relative.values():
            sums[row] = 0.0

    def contained(self, rows: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG002
        """States `[T, d]` of `rows` as the model goes on with them after an edit."""
        return after

    def add_relative(self, point: HookPoint, rows: Tensor, sizes: Tensor) -> None:
        """Adds ‖Δx‖/‖x‖ of each token `[T]` to the sum of its row."""
        if point not in self.relative:
            self.relative[point] = torch.zeros(len(self.gate_open), device=sizes.device)
        self.relative[point].index_add_(0, rows, sizes)


class PositionLedger(Ledger):
    """A `Ledger` that also keeps the rules applied at each position, and that grows.

    vLLM may compute a token twice (after a preemption), or never (when its state comes from the
    prefix cache), or once too often (while a stop string is being noticed). A ledger by position is
    right in all three cases: a receipt looks at the positions that its sequence fed, once each.

    Assumes: `expect` names the positions of the batch before a step is finished.
    """

    def __init__(self, rows: int, max_length: int, device: torch.device) -> None:
        super().__init__(rows, device)
        self.applied = np.full((rows, max_length), UNSEEN, dtype=np.uint16)
        self.not_finite = torch.zeros(rows, dtype=torch.bool, device=device)
        """Rows of which a state, or the logits, once were not finite."""
        self._positions: Ints = np.zeros(0, dtype=np.int64)
        self._present: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    def contained(self, rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """`after`, and `before` for tokens that the edit drove beyond all numbers: their requests
        are known by it and get no answer, and the cache holds nothing by which attention over a
        block's unused end (0 · NaN) would harm others.

        Beyond all numbers is a state whose norm is not finite. It has to be kept out here, since
        the next layer writes keys and values of it; on a CPU one look at the whole pass, the
        norm of all its states together, tells that there is none.
        """
        if after.device.type == "cpu" and _all_finite(after):
            return after
        sound = after.float().norm(dim=-1).isfinite()
        lost = ~sound & before.float().norm(dim=-1).isfinite()
        counts = torch.zeros(len(self.not_finite), device=after.device)
        self.not_finite |= counts.index_add_(0, rows, lost.float()) > 0
        return torch.where(lost[:, None], before, after)

    def expect(self, rows: Ints, positions: Ints) -> None:
        """The row and the position of each token of the pass that comes; `NOBODY` is nobody's."""
        self._present = rows != NOBODY
        self._positions = positions

    def reset(self, row: int) -> None:
        super().reset(row)
        self.applied[row] = UNSEEN
        self.not_finite[row] = False

    def record(self, rows: Ints, applied: Ints) -> None:
        """Writes the applied of the present tokens; `rows` holds these alone."""
        super().record(rows, applied)
        self.write(rows, self._positions[self._present], applied)

    def write(self, rows: Ints, positions: Ints, applied: Ints) -> None:
        self.applied[rows, positions] = applied.astype(np.uint16)

    def row(self, row: int, prompt_length: int) -> PositionLedger:
        """A ledger that holds a copy of one row, as far as positions were computed.

        Assumes: behind the prompt no position was left out, so that those after the first unseen
        one need not be looked at.
        """
        length = self._end(row, prompt_length)
        alone = PositionLedger(1, length, self.gate_open.device)
        alone.tokens[0], alone.applied[0] = self.tokens[row], self.applied[row, :length]
        alone.gate_open[0], alone.gate_value[0] = self.gate_open[row], self.gate_value[row]
        alone.not_finite[0] = self.not_finite[row]
        alone.relative = {p: sums[row : row + 1].clone() for p, sums in self.relative.items()}
        return alone

    def _end(self, row: int, prompt_length: int) -> int:
        """The position behind the last one of `row` that was computed."""
        applied = self.applied[row]
        start, size = min(prompt_length, len(applied)), _LOOKED_AT
        while start < len(applied):
            unseen = np.flatnonzero(applied[start : start + size] == UNSEEN)
            if len(unseen):
                start += int(unseen[0])
                break
            start, size = start + size, 2 * size
        if start > prompt_length:
            return min(start, len(applied))
        seen = np.flatnonzero(applied[:start] != UNSEEN)
        return int(seen[-1]) + 1 if len(seen) else 0

    def forget(self, row: int, first: int) -> None:
        """Positions of `row` from `first` on, which its sequence has not kept."""
        self.applied[row, first:] = UNSEEN

    def widen(self, length: int) -> None:
        """Makes room for positions up to `length`."""
        rows, had = self.applied.shape
        if length > had:
            more = np.full((rows, max(length, 2 * had) - had), UNSEEN, dtype=np.uint16)
            self.applied = np.concatenate([self.applied, more], axis=1)

    def grow(self) -> None:
        """Doubles the number of rows."""
        rows, length = self.applied.shape
        bigger = PositionLedger(2 * rows, length, self.gate_open.device)
        bigger.tokens[:rows], bigger.applied[:rows] = self.tokens, self.applied
        bigger.gate_open[:rows], bigger.gate_value[:rows] = self.gate_open, self.gate_value
        bigger.not_finite[:rows] = self.not_finite
        for point, sums in self.relative.items():
            bigger.relative[point] = torch.cat([sums, torch.zeros_like(sums)])
        self.tokens, self.applied, self.relative = bigger.tokens, bigger.applied, bigger.relative
        self.gate_open, self.gate_value = bigger.gate_open, bigger.gate_value
        self.not_finite = bigger.not_finite


def _all_finite(states: Tensor) -> bool:
    """Whether the norm of `states` `[T, d]` is finite, all together; then each one's is.

    Assumes: on a CPU, where looking at a number waits for nobody.
    """
    flat = states.reshape(-1)
    flat = flat if flat.dtype == torch.float32 else flat.float()
    return math.isfinite(float(torch.dot(flat, flat)))
