"""The first principal component of the paired differences, uncentred.

Representation engineering (2310.01405), over positive − negative. The differences must not be
centred: the attribute is what they have in common, which is what centring takes away.
"""

from __future__ import annotations

import torch
from torch import Tensor


class UncentredPCA:
    """The second moment of the differences, DᵀD, kept as few rows.

    Assumes: rows of one width `[n, d]`, positive and negative in pairs.
    Guarantees: exact, and at most 3·d rows of width d are held: beyond 2·d rows (one batch may
    overshoot by less than d) they are replaced by the R of their QR decomposition, which has the
    same second moment.
    """

    def __init__(self, width: int) -> None:
        self._rows = torch.zeros(0, width)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._pairs = 0

    def add(self, positive: Tensor, negative: Tensor) -> None:
        differences = positive.float() - negative.float()
        self._sum += differences.double().sum(0)
        self._pairs += differences.shape[0]
        width = self._rows.shape[1]
        for first in range(0, differences.shape[0], width):
            self._rows = torch.cat([self._rows, differences[first : first + width]])
            if self._rows.shape[0] > 2 * width:
                self._rows = torch.linalg.qr(self._rows, mode="r").R

    def direction(self) -> Tensor:
        """The component, float32 `[d]`, pointing to the positive class and as long as the mean
        difference along it, so that strength 1 means the same as for a difference of means.

        Zeros where the differences vanish or their mean is orthogonal to the component.
        """
        if not bool(self._rows.any()):
            return torch.zeros(self._rows.shape[1])
        component = torch.linalg.svd(self._rows.double(), full_matrices=False).Vh[0]
        # The projection of the mean difference carries the sign: no separate flip is needed.
        gap = component @ (self._sum / self._pairs)
        direction: Tensor = (component * gap).float()
        return direction

    @property
    def held_floats(self) -> int:
        """Numbers in memory now."""
        return self._rows.numel() + self._sum.numel()
