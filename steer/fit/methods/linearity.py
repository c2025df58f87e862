"""Is the attribute a direction at all? Two preflights.

`Parallelism` asks whether the differences of pairs are parallel (2403.03867: concepts with a linear
origin have parallel differences): their mean cosine is near 1 for one shared direction and near 0
for unrelated ones. `intrinsic_dimension` estimates how many dimensions a set of states fills
(2506.01034, by TwoNN, Facco et al. 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.errors import SteerError


class Parallelism:
    """The mean cosine between the differences of all pairs, from their running sum.

    Memory: d numbers, because Σ_{i≠j} cos(dᵢ, dⱼ) = ‖Σ d̂ᵢ‖² − n.
    """

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._count = 0

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """Takes the states `[n, d]` of n pairs; a pair without a difference does not count."""
        differences = positive.double() - negative.double()
        lengths = differences.norm(dim=-1, keepdim=True)
        kept = lengths[:, 0] > 0
        self._sum += (differences[kept] / lengths[kept]).sum(0)
        self._count += int(kept.sum())

    def mean_cosine(self) -> float | None:
        """From −1/(n−1) to 1; None for fewer than two pairs."""
        n = self._count
        return None if n < 2 else float((self._sum @ self._sum - n) / (n * (n - 1)))


def intrinsic_dimension(states: Tensor, *, discarded: float = 0.1, chunk: int = 512) -> float:
    """The dimension that `states` `[n, d]` fill, by the ratio μ of the distances to the second and
    the first neighbour: −log(1 − F(μ)) = dimension · log μ, fitted through the origin.

    The largest share `discarded` of the ratios is left out, as the authors do. Equal rows count
    once. It grows slower than the true dimension when points are few (2,000 points: 2.0, 4.7, 8.5
    for 2, 5, 10). Memory: chunk·n distances in float64, and one copy of the states.

    Raises `SteerError` for fewer than 20 different states.
    """
    points = torch.unique(states.double(), dim=0)
    n = len(points)
    if n < 20:
        raise SteerError(
            f"{n} different states are too few for a dimension: give at least 20", code="no_states"
        )
    ratios = []
    for first in range(0, n, chunk):
        # Without matrix products: their rounding is as large as the distances of close neighbours.
        distances = torch.cdist(
            points[first : first + chunk], points, compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = distances.topk(3, largest=False).values
        ratios.append(nearest[:, 2] / nearest[:, 1])
    ratio = torch.cat(ratios).sort().values
    kept = int(n * (1 - discarded))
    x = ratio[:kept].log()
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / n)
    return float((x @ y) / (x @ x))
