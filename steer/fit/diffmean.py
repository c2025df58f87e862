"""Difference of means: the vector from the negative class's mean to the positive one's.

Contrastive activation addition (2312.06681). Memory: two float64 rows per layer, however many
pairs there are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DifferenceOfMeans:
    """Running sums of both classes.

    Assumes: rows of one width `[n, d]`, positive and negative in pairs.
    Guarantees: `direction()` has the length of the gap between the classes, so that adding it once
    moves a state from one mean to the other.
    """

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._pairs = 0

    def add(self, positive: Tensor, negative: Tensor) -> None:
        self._sum += (positive.double() - negative.double()).sum(0)
        self._pairs += positive.shape[0]

    def direction(self) -> Tensor:
        """The class gap, float32 `[d]`; zeros where the classes have the same mean."""
        return (self._sum / self._pairs).float()

    @property
    def held_floats(self) -> int:
        """Numbers in memory now."""
        return self._sum.numel()
