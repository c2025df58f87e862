"""How much over the generated tokens: `ramp`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from steer.errors import quoted
from steer.spec.base import Index, Number

MAX_RAMP_POINTS = 64
"""The most points that a ramp has."""


def _within(value: Any) -> Any:
    """Whatever is a number but no factor is told in one sentence; the rest is left to the type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not 0 <= value <= 1:
        raise ValueError(
            f"{quoted(value)} is not a factor between 0 and 1: a ramp says which share of the edit "
            "a token gets; say the largest with 'strength' (or 'value'), and divide the ramp by it"
        )
    return value


def _listed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(
            "a ramp is a list of points [generated token, factor], such as [[0, 0], [32, 1]]; got "
            + quoted(value)
        )
    return value


def _ascending(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    for (before, _), (after, _) in pairwise(points):
        if after <= before:
            raise ValueError(
                f"the points of a ramp come in the order of their tokens, each token once: {after} "
                f"stands behind {before}"
            )
    return points


Factor: TypeAlias = Annotated[Number, Field(ge=0, le=1), BeforeValidator(_within)]
RampPoints: TypeAlias = Annotated[
    tuple[tuple[Index, Factor], ...],
    Field(min_length=1, max_length=MAX_RAMP_POINTS, fail_fast=True),
    AfterValidator(_ascending),
    BeforeValidator(_listed),
]
"""Points `[generated token, factor]`, joined by straight lines: the factor by which what an
intervention changes in a token is multiplied. Generated tokens are counted from 0; before the first
point, and so in the prompt, the factor is the first point's, and after the last the last's."""
