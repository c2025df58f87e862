"""The first and second moments of a stream of states."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Σx `[d]` and Σxxᵀ `[d, d]`, not centred, in float64.

    Guarantees: d² + d numbers however many rows there are.
    """

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, dtype=torch.float64)
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Takes states `[n, d]`."""
        rows = rows.double()
        self.total += rows.sum(0)
        self.gram.addmm_(rows.T, rows)
        self.count += len(rows)
