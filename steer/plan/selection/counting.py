"""Tokens by their number: schedules, and ramps of strength."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer.spec import RampPoints

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Factors = NDArray[np.float32]
Floats = NDArray[np.float64]

_LEAST = 1e-30
"""What is less than this at a point of a ramp is 0, so that nothing between two points rounds to 0
in float32."""


class _Numbered:
    """What counts tokens from the position `origin`, or else from the prompt's end."""

    origin: int | None

    def start(self, prompt_length: int) -> int:
        """The position of the token that it counts as 0."""
        return prompt_length if self.origin is None else self.origin


@dataclass(frozen=True)
class Counted(_Numbered):
    """A `Schedule`."""

    nth: int = 1
    first: int | None = None
    origin: int | None = None

    def mask(self, positions: Ints, prompt_length: int) -> Mask:
        number = positions - self.start(prompt_length)
        chosen: Mask = (number >= 0) & (number % self.nth == 0)
        return chosen if self.first is None else chosen & (number < self.first)

    def edges(self, prompt_length: int) -> list[int]:
        """The positions at which the mask begins and ends, however often it changes between."""
        start = self.start(prompt_length)
        return [start, start + (self.first or 0)]


class Lines(NamedTuple):
    """A ramp as lines, one behind the other: the token `begins[n]`, counted as the ramp counts, has
    the factor `bases[n]`, and every token further `slopes[n]` more, up to the token `ends[n]`."""

    begins: Floats
    ends: Floats
    bases: Floats
    slopes: Floats

    def at(self, numbers: Ints) -> Ints:
        """The line of each of the tokens `numbers` `[T]`."""
        return np.searchsorted(self.ends, numbers, side="right")

    def factors(self, lines: Ints, numbers: Ints) -> Factors:
        """The factor of each of the tokens `numbers` `[T]`, which lie on `lines` `[T]`; float32."""
        found: Floats = self.bases[lines] + self.slopes[lines] * (numbers - self.begins[lines])
        return found.astype(np.float32)


@dataclass(frozen=True)
class Ramp(_Numbered):
    """How much of an edit a token gets: `points` joined by straight lines, constant before the
    first and after the last. Factors are within 0 and 1."""

    points: RampPoints
    origin: int | None = None

    @staticmethod
    def of(points: RampPoints | None) -> Ramp | None:
        """The ramp through `points`; None where it leaves every edit as it is."""
        if points is None or all(factor == 1 for _, factor in points):
            return None
        return Ramp(points)

    def factors(self, positions: Ints, prompt_length: int) -> Factors:
        """The factor of each token `[T]`, float32."""
        numbers: Ints = positions - self.start(prompt_length)
        return self.lines.factors(self.lines.at(numbers), numbers)

    @property
    def largest(self) -> float:
        """The largest factor that a token may get."""
        return max(factor for _, factor in self.points)

    def edges(self, prompt_length: int) -> list[int]:
        """The positions at which the factor becomes 0, or more than 0."""
        near = np.array(sorted({token + more for token, _ in self.points for more in (0, 1)}))
        near += self.start(prompt_length)
        before, at = (self.factors(near - back, prompt_length) > 0 for back in (1, 0))
        found: list[int] = near[before != at].tolist()
        return found

    @cached_property
    def lines(self) -> Lines:
        """Its own: one before the first point, one behind each."""
        tokens, factors = (np.array(one, np.float64) for one in zip(*self.points, strict=True))
        factors[factors < _LEAST] = 0
        slopes = np.diff(factors) / np.diff(tokens)
        return Lines(
            begins=np.append(tokens[:1], tokens),
            ends=np.append(tokens, np.inf),
            bases=np.append(factors[:1], factors),
            slopes=np.concatenate([[0.0], slopes, [0.0]]),
        )
