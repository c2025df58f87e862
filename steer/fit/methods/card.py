"""What the card of a fitted vector records besides its measures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.spec import Site, Where

Item = TypeVar("Item")
WhereName: TypeAlias = Literal["last", "onward", "generation", "all"]

WHERES: Mapping[str, Where | None] = MappingProxyType(
    {
        "last": Where(positions=((-1, None),), phases=("prompt",)),
        "onward": Where(positions=((-1, None),)),
        "generation": Where(phases=("generation",)),
        "all": None,
    }
)
"""Where a fitted vector acts unless a request says otherwise: on the last prompt token, on that
and what is generated, on what is generated, or on every token."""

MIN_HELD_OUT = 4


def where_named(name: str) -> Where | None:
    """The place of `WHERES` called `name`; raises `SteerError`."""
    if name not in WHERES:
        raise SteerError(
            f"there is no place {name!r}: use one of {', '.join(WHERES)}", code="invalid_option"
        )
    return WHERES[name]


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
    for name, other in sorted(beside.items()):
        if (other.card.site, other.card.width) != (site, mine.card.width):
            continue
        shared = {str(layer): round(value, 4) for layer, value in mine.cosine(other).items()}
        if shared:
            found[name] = shared
    return found
