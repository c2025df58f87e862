"""Where the states of several prompts lie in the plane, or the space, of a few registered vectors.

Vectors are seldom at right angles, and a projection on one counts what lies along another. The
coordinates are the multiples of the unit vectors whose sum comes nearest to the state.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from steer.artefacts.library import Library, MemoryLibrary
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, pointer
from steer.inspection.directions import direction_named
from steer.inspection.matching.background import PLAIN_TEXTS, backgrounds
from steer.inspection.matching.scatter import Scatter
from steer.inspection.method import Finite, Inspection, reads_states
from steer.inspection.selection import plan_for, roles_for
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.points import row
from steer.prompts import Place, PromptInput, encode_prompt
from steer.spec import Layer, Name, Site, SteeringSpec

_LEAST_EIGENVALUE = 1e-6
_DRAWS = 32


class CoordinatesRequest(BaseModel):
    """Prompts, each read at `position`, and vectors that have a direction at `layer`.

    `origin` is what coordinates are counted from: the mean of the prompts' states, or zero.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[tuple[PromptInput, ...], Field(min_length=1, max_length=256, fail_fast=True)]
    vectors: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16, fail_fast=True)]
    layer: Layer
    site: Site = "resid_post"
    position: Place = -1
    origin: Literal["mean", "zero"] = "mean"
    steering: SteeringSpec | None = None

    @model_validator(mode="after")
    def _has_a_mean(self) -> CoordinatesRequest:
        if self.origin == "mean" and len(self.prompts) < 2:
            raise ValueError("one prompt is its own mean: give more 'prompts', or 'origin': 'zero'")
        return self


class StateCoordinates(BaseModel):
    """One prompt's state: a multiple of each unit vector, in units of the stream, and the share of
    its squared length from the origin that they make up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    position: int
    coordinates: tuple[Finite, ...]
    explained: Finite


class CoordinatesResult(BaseModel):
    """`points` in the order of the prompts. `cosines` are those between the vectors; `explained` is
    the share of all squared lengths, `by_chance` the mean of as many random directions that vary as
    the states of plain texts do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.coordinates"] = "inspect.coordinates"
    model: str
    site: Site
    layer: int
    vectors: tuple[str, ...]
    origin: Literal["mean", "zero"]
    cosines: tuple[tuple[Finite, ...], ...]
    points: tuple[StateCoordinates, ...]
    explained: Finite
    by_chance: Finite
    fingerprint: str | None = None


def coordinates(
    engine: Engine,
    request: CoordinatesRequest,
    *,
    library: Library | None = None,
    plans: PlanCache | None = None,
) -> CoordinatesResult:
    """The states of the prompts, under `request.steering` where it has one, as coordinates.

    Raises `SteerError` with a pointer into the request; `dependent_vectors` where one vector is
    made of the others, so that coordinates mean nothing.
    """
    COORDINATES.require(engine)
    point = HookPoint(request.layer, request.site)
    engine.info.check_point(HookPoint(request.layer), param="/layer")
    engine.info.check_point(point, param="/site")
    units = _directions(engine, request, library or MemoryLibrary(), point)
    plan = plan_for(engine, request.steering, plans, at="/steering")
    places: list[tuple[str, int]] = []
    states = []
    for n, given in enumerate(request.prompts):
        prompt = encode_prompt(engine, given, at=pointer("prompts", n))
        position = prompt.position(request.position, param="/position")
        places.append((prompt.tokens[position], position))
        roles = [roles_for(plan, prompt)]
        asked = CaptureRequest([prompt.ids], (point,), (position,), [plan], roles=roles)
        states.append(engine.capture(asked)[0].states[point][0])
    x = torch.stack(states).double().cpu()
    y = x - x.mean(0) if request.origin == "mean" else x
    found, shares, explained = _least_squares(y, units)
    (background,) = backgrounds(engine, PLAIN_TEXTS, [point]).values()
    chance = [
        _least_squares(y, background.directions(len(units), seed))[2] for seed in range(_DRAWS)
    ]
    return CoordinatesResult(
        model=engine.info.name,
        site=request.site,
        layer=request.layer,
        vectors=request.vectors,
        origin=request.origin,
        cosines=tuple(map(tuple, (units @ units.T).tolist())),
        points=tuple(
            StateCoordinates(
                token=token, position=position, coordinates=tuple(numbers), explained=share
            )
            for (token, position), numbers, share in zip(
                places, found.tolist(), shares.tolist(), strict=True
            )
        ),
        explained=explained,
        by_chance=sum(chance) / len(chance),
        fingerprint=plan.fingerprint if plan else None,
    )


def _directions(
    engine: Engine, request: CoordinatesRequest, library: Library, point: HookPoint
) -> Float[Tensor, "k width"]:
    """The vectors' unit directions at `point`, none made of the others."""
    rows = []
    for n, name in enumerate(request.vectors):
        at = pointer("vectors", n)
        vector = direction_named(engine, library, name, site=request.site, points=(point,), at=at)
        rows.append(row(vector, point.layer).double())
    stacked = torch.stack(rows)
    units: Tensor = stacked / stacked.norm(dim=-1, keepdim=True)
    gram = units @ units.T
    for n in range(1, len(units)):
        if float(torch.linalg.eigvalsh(gram[: n + 1, : n + 1])[0]) < _LEAST_EIGENVALUE:
            raise SpecError(
                f"the vector {request.vectors[n]!r} is made of those before it at layer "
                f"{point.layer}, so that coordinates along it mean nothing: leave it out",
                param=pointer("vectors", n),
                code="dependent_vectors",
            )
    return units


def _least_squares(
    y: Float[Tensor, "n width"], units: Float[Tensor, "k width"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"], float]:
    """Coordinates, the share of each squared length that they make up, and of all together."""
    along = y @ units.T
    found = torch.linalg.lstsq(units @ units.T, along.T).solution.T
    made = (found * along).sum(-1)
    lengths = y.pow(2).sum(-1)
    shares = made / lengths.clamp_min(1e-30)
    return found, shares, float(made.sum() / lengths.sum().clamp_min(1e-30))


def coordinates_scatter(result: CoordinatesResult) -> Scatter:
    """The first two vectors' plane; with a single vector the prompts' numbers go up."""
    single = len(result.vectors) == 1
    return Scatter(
        title=f"Along {' and '.join(result.vectors[:2])}",
        subtitle=f"{result.model} · layer {result.layer}, {result.site} · explains "
        f"{result.explained:.2f}, {result.by_chance:.2f} by chance",
        axes=(result.vectors[0], "prompt" if single else result.vectors[1]),
        points=[
            (one.coordinates[0], float(n) if single else one.coordinates[1])
            for n, one in enumerate(result.points)
        ],
        names=[f"{n}{one.token}" for n, one in enumerate(result.points)],
    )


COORDINATES = Inspection(
    name="coordinates",
    summary="Where the states of several prompts lie in the space of a few registered vectors.",
    request=CoordinatesRequest,
    result=CoordinatesResult,
    run=coordinates,
    draw=coordinates_scatter,
    possible=reads_states,
)
