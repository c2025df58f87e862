"""How well a direction tells two classes of states apart, from running sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from steer.artefacts.control_vector import LayerMeasure


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of a stream of numbers (Welford, in batches)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        n = values.numel()
        if n == 0:
            return
        values = values.double()
        mean = float(values.mean())
        gap, total = mean - self.mean, self.count + n
        self.squares += float(((values - mean) ** 2).sum()) + gap**2 * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    @property
    def variance(self) -> float:
        """The unbiased variance; 0 for fewer than two numbers."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0


class Separation:
    """Projections of both classes on a unit direction, and the states' norms.

    Guarantees: constant memory.
    """

    def __init__(self, direction: Tensor) -> None:
        self._unit = direction / direction.norm()
        self._positive, self._negative = RunningMoments(), RunningMoments()
        self._norm = RunningMoments()

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """Takes the states `[n, d]` of n pairs."""
        self._positive.add(positive @ self._unit)
        self._negative.add(negative @ self._unit)
        self._norm.add(positive.norm(dim=-1))
        self._norm.add(negative.norm(dim=-1))

    def measure(self) -> LayerMeasure:
        """d′, (μ⁺ − μ⁻) / √((σ⁺² + σ⁻²)/2), where it exists; class means; mean norm."""
        pooled = math.sqrt((self._positive.variance + self._negative.variance) / 2)
        gap = self._positive.mean - self._negative.mean
        return LayerMeasure(
            separation=gap / pooled if pooled > 0 else None,
            positive=self._positive.mean,
            negative=self._negative.mean,
            residual_norm=self._norm.mean,
        )
