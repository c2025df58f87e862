"""What the card of a fitted vector records besides its measures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.spec import Site

Item = TypeVar("Item")
MIN_HELD_OUT = 4


def split(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Items to fit on, and `share` of them, drawn with `seed`, to measure on.

    With fewer than four to measure on, a variance says little: then all items do both.
    """
    if not 0 <= share <= 0.9:
        raise SteerError(
            f"held_out is a share between 0 and 0.9; got {share!r}", code="invalid_option"
        )
    order = list(items)
    random.Random(seed).shuffle(order)
    measured = round(len(order) * share)
    if measured < MIN_HELD_OUT:
        return order, list(order)
    return order[measured:], order[:measured]


def best_layers(measures: Mapping[int, LayerMeasure], count: int) -> tuple[int, ...]:
    """The `count` layers with the greatest separation, in order; the earlier one on a tie."""
    ranked = sorted(measures, key=lambda n: (-(measures[n].separation or 0.0), n))
    return tuple(sorted(ranked[:count]))


def made_on(engine: Engine) -> dict[str, Any]:
    """The model a vector was fitted on, for its provenance."""
    return {"model": engine.info.own_name, "architecture": engine.info.architecture}


def cosines(
    directions: Mapping[int, Tensor], site: Site, beside: Mapping[str, ControlVector]
) -> dict[str, dict[str, float]]:
    """The cosine to each vector of `beside` on every layer both have, rounded for the card.

    Vectors of another site or width are passed over: they are not in the same space.
    """
    mine = ControlVector.of(directions, site=site)
    found: dict[str, dict[str, float]] = {}
    for name in sorted(beside):
        other = beside[name]  # one at a time: a registry's may be many
        if (other.card.site, other.card.width) != (site, mine.card.width):
            continue
        shared = {str(layer): round(value, 4) for layer, value in mine.cosine(other).items()}
        if shared:
            found[name] = shared
    return found
