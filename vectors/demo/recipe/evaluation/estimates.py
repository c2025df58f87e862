"""Measured values with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

Z = 1.959964
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from ``n`` observations."""

    value: float
    low: float
    high: float
    n: int


def share(hits: Sequence[bool]) -> Estimate:
    """The share of hits, with Wilson's interval."""
    n = len(hits)
    found = binomtest(sum(hits), n).proportion_ci(method="wilson")
    return Estimate(sum(hits) / n, float(found.low), float(found.high), n)


def bootstrap(
    statistic: Callable[[Any], float], units: int, *, level: float = 0.95, n: int | None = None
) -> Estimate:
    """A statistic of all units, with its percentile interval over resampled units.

    ``statistic`` takes indices of units; they are drawn with a fixed seed. ``n`` is reported
    where the units are groups of observations.
    """
    draw = np.random.default_rng(0)
    tail = (1 - level) / 2
    values = [statistic(draw.integers(0, units, units)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, (tail, 1 - tail))
    return Estimate(statistic(np.arange(units)), float(low), float(high), n or units)


def difference(first: Sequence[float], second: Sequence[float], *, level: float = 0.95) -> Estimate:
    """The mean of first − second, paired."""
    each = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return bootstrap(lambda some: float(each[some].mean()), len(each), level=level)


def difference_of_ratios(
    first: Sequence[tuple[float, int]], second: Sequence[tuple[float, int]]
) -> Estimate:
    """Σ sums / Σ counts of the first less that of the second, units paired."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)

    def statistic(some: Any) -> float:
        left, right = a[some].sum(0), b[some].sum(0)
        return float(left[0] / left[1] - right[0] / right[1])

    return bootstrap(statistic, len(a))
