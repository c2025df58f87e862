"""What was really done to every token of every running request, by position.

vLLM may compute a token twice (after a preemption), or never (when its state comes from the
prefix cache), or once too often (while a stop string is being noticed). A ledger by position is
right in all three cases: a receipt looks at the positions that its sequence fed, once each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from steer.batch.ledger import Ledger
from steer.batch.requests import NOBODY, Ints

UNSEEN = 0xFFFF
"""Marks a position that no pass has computed."""


class PositionLedger(Ledger):
    """A `Ledger` that also keeps the passes' bits of each position, and that grows.

    Assumes: `expect` names the positions of the batch before a step is finished.
    """

    def __init__(self, rows: int, max_length: int, device: torch.device) -> None:
        super().__init__(rows, device)
        self.bits = np.full((rows, max_length), UNSEEN, dtype=np.uint16)
        self._positions: Ints = np.zeros(0, dtype=np.int64)
        self._present: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    def expect(self, rows: Ints, positions: Ints) -> None:
        """The row and the position of each token of the pass that comes; `NOBODY` is nobody's."""
        self._present = rows != NOBODY
        self._positions = positions

    def reset(self, row: int) -> None:
        super().reset(row)
        self.bits[row] = UNSEEN

    def record(self, rows: Ints, bits: Ints) -> None:
        """Writes the bits of the present tokens; `rows` holds these alone."""
        super().record(rows, bits)
        self.write(rows, self._positions[self._present], bits)

    def write(self, rows: Ints, positions: Ints, bits: Ints) -> None:
        self.bits[rows, positions] = bits.astype(np.uint16)

    def row(self, row: int) -> PositionLedger:
        """A ledger that holds a copy of one row, as far as positions were computed."""
        seen = np.flatnonzero(self.bits[row] != UNSEEN)
        length = int(seen[-1]) + 1 if len(seen) else 0
        alone = PositionLedger(1, length, self.gate_open.device)
        alone.tokens[0], alone.bits[0] = self.tokens[row], self.bits[row, :length]
        alone.gate_open[0], alone.gate_value[0] = self.gate_open[row], self.gate_value[row]
        alone.relative = {p: sums[row : row + 1].clone() for p, sums in self.relative.items()}
        return alone

    def grow(self) -> None:
        """Doubles the number of rows."""
        rows, length = self.bits.shape
        bigger = PositionLedger(2 * rows, length, self.gate_open.device)
        bigger.tokens[:rows], bigger.bits[:rows] = self.tokens, self.bits
        bigger.gate_open[:rows], bigger.gate_value[:rows] = self.gate_open, self.gate_value
        for point, sums in self.relative.items():
            bigger.relative[point] = torch.cat([sums, torch.zeros_like(sums)])
        self.tokens, self.bits, self.relative = bigger.tokens, bigger.bits, bigger.relative
        self.gate_open, self.gate_value = bigger.gate_open, bigger.gate_value
