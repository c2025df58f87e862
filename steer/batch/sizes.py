"""How large edits are: the mean of ‖Δx‖/‖x‖ at a hook point, for each request row."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanSizes:
    """Sums and counts of what a pass measured, `[rows, 1 + drafts, 2]`, on the device.

    What the n-th drafted token of a row adds stands apart, in column n, until `settle` says whether
    the token stayed; all others are in column 0.
    """

    def __init__(self, rows: int, drafts: int, device: torch.device) -> None:
        self._sums = torch.zeros(rows, 1 + drafts, 2, device=device)

    def add(self, rows: Tensor, drafts: Tensor | None, sizes: Tensor, edited: Tensor) -> None:
        """Adds the `sizes` of the tokens `[T]` that were `edited`; `drafts` numbers those that are
        drafted from 1, None where none is."""
        places = rows * self._sums.shape[1]
        if drafts is not None:
            places = places + drafts
        both = torch.stack([sizes.where(edited, 0.0), edited.to(sizes.dtype)], dim=-1)
        self._sums.view(-1, 2).index_add_(0, places, both)

    def settle(self, rows: Tensor, stayed: Tensor) -> None:
        """Of the first drafted tokens of `rows` `[R]`, `stayed` `[R]` count; the others do not."""
        mine = self._sums[rows]
        numbers = torch.arange(1, mine.shape[1], device=rows.device)
        kept = mine[:, 1:].where((numbers <= stayed[:, None])[..., None], 0.0)
        mine[:, 0] += kept.sum(dim=1)
        mine[:, 1:] = 0.0
        self._sums[rows] = mine

    def reset(self, row: int) -> None:
        self._sums[row] = 0.0

    def mean(self, row: int) -> float | None:
        """The mean over the tokens of `row` that were edited; None where none was."""
        total, count = self._sums[row, 0].tolist()
        return total / count if count else None

    def row(self, row: int) -> MeanSizes:
        """A copy of one row."""
        alone = MeanSizes(0, 0, self._sums.device)
        alone._sums = self._sums[row : row + 1].clone()
        return alone

    def grow(self) -> None:
        """Doubles the number of rows."""
        self._sums = torch.cat([self._sums, torch.zeros_like(self._sums)])
