"""What was really applied to the requests that run: the source of their receipts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steer.batch.requests import Ints
from steer.batch.tables import MAX_PASSES
from steer.model import HookPoint


class Ledger:
    """What was applied to each request row, and the decisions that its gates hold.

    `tokens[row, bits]` counts the tokens that the passes named by `bits` edited.
    Assumes: a row is reset before a request takes it.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.tokens = np.zeros((rows, 1 << MAX_PASSES), dtype=np.int64)
        self.gate_open = torch.zeros(rows, MAX_PASSES, dtype=torch.bool, device=device)
        self.gate_value = torch.full((rows, MAX_PASSES), float("nan"), device=device)
        self.relative: dict[HookPoint, Tensor] = {}

    def reset(self, row: int) -> None:
        self.tokens[row] = 0
        self.gate_open[row] = False
        self.gate_value[row] = float("nan")
        for sums in self.relative.values():
            sums[row] = 0.0

    def record(self, rows: Ints, bits: Ints) -> None:
        """Counts tokens `[T]` of `rows` that the passes named by `bits` edited."""
        # One flat index: numpy adds at several ten times more slowly.
        np.add.at(self.tokens.reshape(-1), rows * self.tokens.shape[1] + bits, 1)

    def recount(self, row: int) -> None:
        """Counts a row from zero again, because its tokens are computed anew; its gates' decisions
        stand."""
        self.tokens[row] = 0
        for sums in self.relative.values():
            sums[row] = 0.0

    def add_relative(self, point: HookPoint, rows: Tensor, sizes: Tensor) -> None:
        """Adds ‖Δx‖/‖x‖ of each token `[T]` to the sum of its row."""
        if point not in self.relative:
            self.relative[point] = torch.zeros(len(self.gate_open), device=sizes.device)
        self.relative[point].index_add_(0, rows, sizes)
