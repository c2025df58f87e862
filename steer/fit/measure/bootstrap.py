"""Percentile bootstrap over prompts: how sure a mean is, and a difference of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure on all prompts, and the central `LEVEL` of it over resampled prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Resamples:
    """Prompts drawn with replacement, `[resamples, prompts]`: the same ones for every figure, so
    that differences between methods are paired."""

    rows: Ints

    @staticmethod
    def draw(prompts: int, *, resamples: int = 2000, seed: int = 0) -> Resamples:
        generator = np.random.default_rng(seed)
        return Resamples(generator.integers(0, prompts, size=(resamples, prompts)))

    def interval(self, figure: Callable[[Ints], Floats]) -> Interval:
        """The interval of `figure`, which maps prompts `[resamples, prompts]` to `[resamples]`."""
        everything = np.arange(self.rows.shape[1])[None]
        found = figure(self.rows)
        found = found[np.isfinite(found)]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(found, [tail, 1 - tail]) if len(found) else (np.nan, np.nan)
        return Interval(float(figure(everything)[0]), float(low), float(high))

    def mean(self, values: Sequence[float]) -> Interval:
        """The mean of one value a prompt; a prompt whose value is NaN does not count."""
        column = np.asarray(values, dtype=np.float64)
        return self.interval(lambda rows: _mean(column[rows]))

    def difference(self, values: Sequence[float], baseline: Sequence[float]) -> Interval:
        """The mean of `values` less that of `baseline`, on the same prompts."""
        a = np.asarray(values, dtype=np.float64)
        b = np.asarray(baseline, dtype=np.float64)
        return self.interval(lambda rows: _mean(a[rows]) - _mean(b[rows]))


def _mean(values: Floats) -> Floats:
    known = ~np.isnan(values)
    count = known.sum(-1)
    total = np.where(known, values, 0.0).sum(-1)
    means: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means
