"""Logistic regression (scikit-learn's), on pairs or on two classes.

Pairs make it *conditional* logistic regression for matched pairs: the differences are the data,
with either sign, and there is no intercept. What the two prompts of a pair have in common then
cannot disturb the direction. Without pairs it is the ordinary regression, classes weighted alike.

Memory: at most `MAX_ROWS` rows of width d for each class (pairs: of differences), a uniform sample
of the data beyond that (reservoir sampling, with a fixed seed), and scikit-learn's own copies of
them in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.fit.methods.dictionaries.reservoir import Reservoir

MAX_ROWS = 4096


class LogisticDirection:
    """The normal of the separating plane, as long as the gap between the classes along it.

    Assumes: rows of one width `[n, d]`; positive and negative in pairs if `paired`.
    Guarantees: memory as the module says; the same result for any cut into batches.
    """

    def __init__(self, width: int, *, paired: bool = True, c: float = 1.0) -> None:
        self._paired, self._c = paired, c
        self._samples = [Reservoir(width, MAX_ROWS, seed) for seed in range(1 if paired else 2)]
        self._sums = torch.zeros(2, width, dtype=torch.float64)
        self._counts = [0, 0]

    def add(self, positive: Tensor, negative: Tensor) -> None:
        for side, states in enumerate((positive, negative)):
            self._sums[side] += states.double().sum(0)
            self._counts[side] += states.shape[0]
            if not self._paired:
                self._samples[side].add(states)
        if self._paired:
            self._samples[0].add(positive.float() - negative.float())

    def direction(self) -> Tensor:
        """Float32 `[d]`, pointing to the positive class; zeros where the classes are equal."""
        gap = self._sums[0] / self._counts[0] - self._sums[1] / self._counts[1]
        normal = self._normal()
        direction: Tensor = (normal * (normal @ gap)).float()
        return direction

    def _normal(self) -> Tensor:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 (slow import)

        rows = [sample.rows.double() for sample in self._samples]
        first, second = (rows[0], -rows[0]) if self._paired else (rows[0], rows[1])
        data = torch.cat([first, second])
        centre = torch.zeros_like(data[0]) if self._paired else data.mean(0)
        scale = (data - centre).norm(dim=-1).mean()
        if not bool(scale > 0):
            return torch.zeros_like(data[0])
        labels = [1] * len(first) + [0] * len(second)
        model = LogisticRegression(
            C=self._c, fit_intercept=not self._paired, class_weight="balanced", max_iter=1000
        )
        model.fit(((data - centre) / scale).numpy(), labels)
        weights: Tensor = torch.from_numpy(model.coef_[0]).double()
        unit: Tensor = weights / weights.norm().clamp_min(torch.finfo(torch.float64).tiny)
        return unit

    @property
    def held_floats(self) -> int:
        """Numbers in memory now, between calls of `add`."""
        return sum(s.rows.numel() for s in self._samples) + self._sums.numel()
