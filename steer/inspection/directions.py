"""Registered vectors as directions that states are read along."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library
from steer.engines.base import Engine
from steer.errors import IncompatibleArtefact, SpecError, SteerError
from steer.model import HookPoint
from steer.plan.points import row
from steer.spec import Site


def direction_named(
    engine: Engine,
    library: Library,
    name: str,
    *,
    site: Site,
    points: Sequence[HookPoint] = (),
    at: str,
) -> ControlVector:
    """The vector that `name` means, which fits the model's states at `site` and has a direction for
    each of `points`.

    Raises `SteerError` at the pointer `at`: `unknown_vector`, `layer_not_in_vector`, `wrong_site`,
    `wrong_width`.
    """
    try:
        vector = library.vector(name)
        for point in points:
            row(vector, point.layer)
    except SteerError as error:
        raise error.at(at) from None
    if vector.card.site != site:
        raise SpecError(
            f"the vector {name!r} belongs to {vector.card.site}; this request reads "
            f"{site}: set 'site' to {vector.card.site!r}",
            param=at,
            code="wrong_site",
        )
    width = engine.info.width(site)
    if vector.card.width != width:
        raise IncompatibleArtefact(
            f"the vector {name!r} has width {vector.card.width}; {site} of "
            f"{engine.info.name!r} has width {width}",
            param=at,
            code="wrong_width",
        )
    return vector


def direction_at(vector: ControlVector, layer: int) -> Float[Tensor, " width"] | None:
    """The vector's direction at `layer`: its own, or its only one; None where it has others."""
    if len(vector.directions) > 1 and layer not in vector.directions:
        return None
    return row(vector, layer)
