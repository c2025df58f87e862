"""The strength at which a vector moves the model as far as another one: equal KL.

The KL grows about as a power of the strength, near 0 as its square: a few steps, each along the
power that the last two reads tell, find the strength. All vectors that are matched take each step
together, in the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from steer.fit.measure.answers import Progress
from steer.fit.measure.divergence import References
from steer.plan.plan import SteeringPlan

PlanAt: TypeAlias = Callable[[float], SteeringPlan]

TOLERANCE = 0.05
"""How far the KL may be from the one asked for, as a share of it."""

MOST_READS = 8
_FURTHEST = 4.0
"""A step outward goes no further than this factor: far out, the KL is no longer what it was."""

_LEAST_POWER = 0.5
"""What grows more slowly saturates, and its power says little of what comes."""


@dataclass(frozen=True)
class Match:
    """The strength whose KL came nearest to the one asked for, that KL, in how many `reads` of the
    answers it was found, and whether it is within tolerance (`reached`): a vector can saturate."""

    strength: float
    kl: float
    reads: int
    reached: bool


def matched_strength(
    references: References,
    plan_at: PlanAt,
    kl: float,
    *,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    most_reads: int = MOST_READS,
) -> Match:
    """The strength of one vector; as `matched_strengths`."""
    [found] = matched_strengths(
        references, [plan_at], [kl], start=[start], tolerance=tolerance, most_reads=most_reads
    )
    return found


def matched_strengths(
    references: References,
    plans_at: Sequence[PlanAt],
    kl: Sequence[float],
    *,
    start: Sequence[float],
    tolerance: float = TOLERANCE,
    most_reads: int = MOST_READS,
    progress: Progress | None = None,
) -> list[Match]:
    """For each `plans_at[n]`, the strength above 0 at which its mean KL over the answers of
    `references` is `kl[n]` nats, searched from `start[n]`.

    Each takes at most `most_reads` reads of all answers. `progress` is told of every one that was
    settled. Raises as `References.divergences`.
    """
    searches = [_Search(wanted, first, tolerance) for wanted, first in zip(kl, start, strict=True)]
    for _ in range(most_reads):
        open_ones = [n for n, one in enumerate(searches) if not one.settled]
        if not open_ones:
            break
        plans = [plans_at[n](searches[n].following) for n in open_ones]
        found = references.divergences(plans).mean(1).tolist()
        for n, nats in zip(open_ones, found, strict=True):
            searches[n].take(nats)
        if progress is not None:
            progress(sum(searches[n].settled for n in open_ones))
    if progress is not None:
        progress(sum(not one.settled for one in searches))
    return [one.match() for one in searches]


@dataclass
class _Search:
    """Bracketed steps along a power of the strength, for one vector.

    `low` and `high` are the nearest points on either side, as (strength, root of the KL).
    """

    wanted: float
    following: float
    tolerance: float
    low: tuple[float, float] = (0.0, 0.0)
    high: tuple[float, float] | None = None
    settled: bool = False
    taken: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settled = self.wanted <= 0
        self.following = abs(self.following) or 1.0

    def take(self, nats: float) -> None:
        """Learns the KL at the strength that was tried, and says which one is next."""
        strength, root = self.following, math.sqrt(nats)
        self.taken.append((strength, nats))
        self.settled = abs(nats - self.wanted) <= self.tolerance * self.wanted
        if nats < self.wanted:
            self.low = (strength, root)
        else:
            self.high = (strength, root)
        self.following = self._outward(strength, root) if self.high is None else self._between()

    def _outward(self, strength: float, root: float) -> float:
        ahead = strength * math.sqrt(self.wanted) / root if root > 0 else math.inf
        return min(self._along_power() or ahead, strength * _FURTHEST)

    def _between(self) -> float:
        assert self.high is not None
        (a, low), (b, high) = self.low, self.high
        guess = self._along_power()
        if guess is not None and a < guess < b:
            return guess
        share = (math.sqrt(self.wanted) - low) / (high - low)
        # Kept off the ends: where the root is bent, a secant creeps along one of them.
        return a + (b - a) * min(max(share, 0.1), 0.9)

    def _along_power(self) -> float | None:
        """Where the power through the last two reads has the KL that is wanted; None where two
        reads make none that a KL could have."""
        if len(self.taken) < 2:
            return None
        (a, before), (b, nats) = self.taken[-2:]
        if a == b or min(before, nats) <= 0:
            return None
        power = math.log(nats / before) / math.log(b / a)
        return b * (self.wanted / nats) ** (1 / power) if power >= _LEAST_POWER else None

    def match(self) -> Match:
        if not self.taken:
            return Match(0.0, 0.0, 0, reached=self.wanted == 0)
        strength, nats = min(self.taken, key=lambda one: abs(one[1] - self.wanted))
        return Match(strength, nats, len(self.taken), self.settled)
