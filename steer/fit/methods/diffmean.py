"""Difference of means: the vector from the negative class's mean to the positive one's.

Contrastive activation addition (2312.06681). Memory: two float64 rows per layer, however many
states there are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DifferenceOfMeans:
    """Running sums of both classes.

    Assumes: rows of one width `[n, d]`; the classes need not be in pairs.
    Guarantees: `direction()` has the length of the gap between the classes, so that adding it once
    moves a state from one mean to the other.
    """

    def __init__(self, width: int) -> None:
        self._sums = torch.zeros(2, width, dtype=torch.float64)
        self._counts = [0, 0]

    def add(self, positive: Tensor, negative: Tensor) -> None:
        for side, states in enumerate((positive, negative)):
            self._sums[side] += states.double().sum(0)
            self._counts[side] += states.shape[0]

    def direction(self) -> Tensor:
        """The class gap, float32 `[d]`; zeros where the classes have the same mean."""
        means = self._sums / torch.tensor(self._counts, dtype=torch.float64)[:, None]
        gap: Tensor = means[0] - means[1]
        # Equal classes summed in another order differ by rounding, which is no direction.
        noise = 1e-12 * means.norm()
        return torch.zeros_like(gap).float() if gap.norm() <= noise else gap.float()

    @property
    def held_floats(self) -> int:
        """Numbers in memory now."""
        return self._sums.numel()
