"""How sure a median is, of rounds within starts.

Two processes of the same program differ by more than their rounds do: where its memory lies is
drawn when a process starts. So rounds of one start are no independent witnesses, and what is drawn
anew is the starts first, and then the rounds of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steer.fit.measure.bootstrap import LEVEL, Interval

RESAMPLES = 4000
FEWEST = 3
"""With fewer values in all there is nothing to judge by."""

Floats = NDArray[np.float64]


def of_starts(starts: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """The median over starts of each one's median over its rounds, and the central 95 % of it over
    starts and rounds drawn with replacement.

    A median, because a start whose machine was busy must not move the answer; of few starts its
    interval is nearly their range, which holds the true median in 15 of 16 times for five. One
    start alone says nothing of others: its interval is that of its rounds.
    """
    values = [np.asarray(one, dtype=np.float64) for one in starts if len(one)]
    if not values:
        raise ValueError("there are no rounds to take a median of")
    generator = np.random.default_rng(seed)
    count = len(values)
    again = np.stack([_medians(generator, one, count) for one in values])
    chosen = generator.integers(0, count, size=(RESAMPLES, count))
    found = np.median(again[chosen, np.arange(RESAMPLES)[:, None], np.arange(count)], axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    middle = float(np.median([np.median(one) for one in values]))
    return Interval(middle, float(low), float(high))


def of_rounds(rounds: Sequence[float], *, seed: int = 0) -> Interval:
    """The same of rounds that share a start."""
    return of_starts([rounds], seed=seed)


def verdict(starts: Sequence[Sequence[float]], aim: float | None, *, at_least: bool = False) -> str:
    """Whether the interval keeps within `aim`; nothing where there is none."""
    if aim is None:
        return ""
    if sum(map(len, starts)) < FEWEST:
        return "too few rounds"
    found = of_starts(starts)
    low, high = (-found.high, -found.low) if at_least else (found.low, found.high)
    aim = -aim if at_least else aim
    if high <= aim:
        return "met"
    return "not met" if low > aim else "undecided"


def _medians(generator: np.random.Generator, rounds: Floats, count: int) -> Floats:
    """Of rounds drawn anew, for each resample and each place that a start may take in it:
    `[resamples, count]`."""
    drawn = generator.integers(0, len(rounds), size=(RESAMPLES, count, len(rounds)))
    medians: Floats = np.median(rounds[drawn], axis=-1)
    return medians
