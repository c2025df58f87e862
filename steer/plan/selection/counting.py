"""Tokens by their number: schedules, and ramps of strength."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from steer.spec import RampPoints

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Factors = NDArray[np.float32]


@dataclass(frozen=True)
class Counted:
    """A `Schedule`; it counts from the position `origin`, or else from the prompt's end."""

    nth: int = 1
    first: int | None = None
    origin: int | None = None

    def mask(self, positions: Ints, prompt_length: int) -> Mask:
        number = positions - (prompt_length if self.origin is None else self.origin)
        chosen: Mask = (number >= 0) & (number % self.nth == 0)
        return chosen if self.first is None else chosen & (number < self.first)


@dataclass(frozen=True)
class Ramp:
    """How much of an edit a token gets: `points` joined by straight lines, constant before the
    first and after the last.

    It counts from the position `origin`, or else from the prompt's end. Factors are within 0 and 1.
    """

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
        tokens, factors = self._columns
        number = positions - (prompt_length if self.origin is None else self.origin)
        return np.interp(number, tokens, factors).astype(np.float32)

    @property
    def largest(self) -> float:
        """The largest factor that a token may get."""
        return max(factor for _, factor in self.points)

    def fixed_from(self, prompt_length: int) -> int:
        """The position from which on the factor stays as it is."""
        return self.points[-1][0] + (prompt_length if self.origin is None else self.origin)

    @cached_property
    def _columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tokens, factors = zip(*self.points, strict=True)
        return np.array(tokens, dtype=np.float64), np.array(factors, dtype=np.float64)
