"""Which registered vectors the states of a prompt point along.

A vector that was fitted on differences of states lies, like them, in the few dimensions that states
fill. So how far a state points along it is told beside random directions that vary as the states of
other texts do, and of the state less those texts' mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library, ListedLibrary, MemoryLibrary
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, SteerError, pointer
from steer.inspection.directions import direction_at, direction_named
from steer.inspection.matching.background import PLAIN_TEXTS, Background, backgrounds
from steer.inspection.matching.result import MatchResult, VectorMatch, match_heat_map
from steer.inspection.method import Inspection, reads_states
from steer.inspection.selection import (
    LayerChoice,
    PositionChoice,
    check_size,
    chosen_points,
    chosen_positions,
    plan_for,
    roles_for,
)
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import PromptInput, encode_prompt
from steer.spec import Name, Site, SteeringSpec

MOST_VECTORS = 256


class MatchRequest(PromptInput):
    """The states of a prompt, and the vectors to hold them against: by name, or all that are
    registered for the model and belong to `site`.

    `background` are other texts, of which chance is told; without any, some plain English
    sentences. `draws` is how many random directions are drawn, from `seed` on.
    """

    vectors: (
        Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST_VECTORS, fail_fast=True)]
        | Literal["all"]
    ) = "all"
    layers: LayerChoice = "all"
    positions: PositionChoice = (-1,)
    site: Site = "resid_post"
    background: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=1 << 14)], ...],
        Field(max_length=64, fail_fast=True),
    ] = ()
    draws: Annotated[int, Field(strict=True, ge=100, le=10_000)] = 4000
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)] = 0
    steering: SteeringSpec | None = None


def match(
    engine: Engine,
    request: MatchRequest,
    *,
    library: Library | None = None,
    plans: PlanCache | None = None,
) -> MatchResult:
    """Holds the prompt's states, under `request.steering` where it has one, against vectors.

    Raises `SteerError` with a pointer into the request, `TooLarge` where the answer would pass
    `MAX_NUMBERS`.
    """
    MATCH.require(engine)
    prompt = encode_prompt(engine, request)
    points = chosen_points(engine, request.layers, request.site)
    positions = chosen_positions(engine, prompt, request.positions)
    vectors, left_out = _vectors(engine, request, library or MemoryLibrary(), points)
    check_size(
        [("layers", len(points)), ("positions", len(positions)), ("vectors", len(vectors))],
        advice="read fewer layers or positions, or name fewer 'vectors'",
        limit=1 << 13,
    )
    plan = plan_for(engine, request.steering, plans, at="/steering")
    other = backgrounds(engine, request.background or PLAIN_TEXTS, points)
    captured = engine.capture(
        CaptureRequest([prompt.ids], points, positions, [plan], roles=[roles_for(plan, prompt)])
    )[0]
    matches: list[VectorMatch] = []
    for point in points:
        matches += _matches(
            request, vectors, point, positions, captured.states[point], other[point]
        )
    return MatchResult(
        model=engine.info.name,
        site=request.site,
        tokens=prompt.tokens,
        positions=positions,
        layers=tuple(point.layer for point in points),
        vectors=tuple(vectors),
        left_out=left_out,
        background=len(other[points[0]].states),
        draws=request.draws,
        matches=tuple(matches),
        fingerprint=plan.fingerprint if plan else None,
    )


def _vectors(
    engine: Engine, request: MatchRequest, library: Library, points: tuple[HookPoint, ...]
) -> tuple[Mapping[str, ControlVector], tuple[str, ...]]:
    """Those that are asked for, by name, and the names of others that the model has."""
    explicit = request.layers != "all"
    if request.vectors != "all":
        named = {
            name: direction_named(
                engine,
                library,
                name,
                site=request.site,
                points=points if explicit else (),
                at=pointer("vectors", place),
            )
            for place, name in enumerate(request.vectors)
        }
        return named, ()
    width = engine.info.width(request.site)
    names = _listed(library, width)
    found: dict[str, ControlVector] = {}
    left_out = []
    for name in names:
        vector = library.vector(name)
        read = vector.card.site == request.site and any(
            direction_at(vector, point.layer) is not None for point in points
        )
        if read:
            found[name] = vector
        else:
            left_out.append(name)
    if not found:
        raise SpecError(
            f"no vector of width {width} for {request.site} of {engine.info.name!r} is registered "
            "that has a direction for these layers: name some in 'vectors'",
            param="/vectors",
            code="no_vectors",
        )
    return found, tuple(left_out)


def _listed(library: Library, width: int) -> tuple[str, ...]:
    if not isinstance(library, ListedLibrary):
        raise SteerError(
            "what is registered here cannot be listed: name the vectors in 'vectors'",
            param="/vectors",
            code="no_vectors",
        )
    names = library.vector_names(width=width, limit=MOST_VECTORS + 1)
    if len(names) > MOST_VECTORS:
        raise SpecError(
            f"more than {MOST_VECTORS} vectors are registered: name those to read in 'vectors'",
            param="/vectors",
            code="too_many_vectors",
        )
    return names


def _matches(
    request: MatchRequest,
    vectors: Mapping[str, ControlVector],
    point: HookPoint,
    positions: tuple[int, ...],
    states: Float[Tensor, "positions width"],
    background: Background,
) -> list[VectorMatch]:
    """The vectors that have a direction at `point`, for each position, strongest first."""
    here = {name: direction_at(vector, point.layer) for name, vector in vectors.items()}
    rows = {name: row for name, row in here.items() if row is not None}
    if not rows:
        return []
    names = list(rows)
    units = _units(torch.stack([rows[name] for name in names]).double())
    x = states.double().cpu()
    along = x @ units.T
    cosines = along / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    centred = _units(x - background.mean)
    found = centred @ units.T
    chance = centred @ background.directions(request.draws, request.seed + point.layer).T
    spread = chance.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    ranked = chance.abs().sort(dim=-1).values
    # A share of draws that is never 0: what was asked for is one of them.
    beyond = request.draws - torch.searchsorted(ranked, found.abs(), right=False)
    shares = (1 + beyond).double() / (1 + request.draws)
    standing = found / spread
    matches = []
    for n, position in enumerate(positions):
        order = standing[n].abs().argsort(descending=True, stable=True).tolist()
        matches += [
            VectorMatch(
                vector=names[k],
                layer=point.layer,
                position=position,
                cosine=float(cosines[n, k]),
                projection=float(along[n, k]),
                match=float(found[n, k]),
                standing=float(standing[n, k]),
                p=float(shares[n, k]),
            )
            for k in order
        ]
    return matches


def _units(rows: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return unit


MATCH = Inspection(
    name="match",
    summary="Which registered vectors states point along, beside random directions like states.",
    request=MatchRequest,
    result=MatchResult,
    run=match,
    draw=match_heat_map,
    possible=reads_states,
)
