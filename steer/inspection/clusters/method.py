"""Clusters of the states of many prompts, each told by its exemplars.

What a model tells apart at a layer, without being asked for any concept: states are joined by how
near they lie, and a cluster is read by the texts nearest its middle and, where labels are given, by
how pure it is (as concepts are annotated by clustering neurons and states; Network Dissection,
1704.05796, for the annotation by exemplars).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, TooLarge, pointer
from steer.inspection.clusters.result import (
    ClusteredState,
    ClustersResult,
    Exemplar,
    StateCluster,
    clusters_heat_map,
)
from steer.inspection.clusters.tree import (
    Cut,
    Linkage,
    cut_tree,
    directions,
    purity,
    purity_by_chance,
)
from steer.inspection.method import Inspection, reads_states
from steer.inspection.selection import PositionChoice, chosen_positions, plan_for, roles_for
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import EncodedPrompt, PromptInput, encode_prompt
from steer.spec import Layer, Site, SteeringSpec

MAX_PROMPTS = 4096
MAX_STATES = 4096
"""Every pair of states is compared."""

_SHOWN = 32
"""Tokens of an exemplar's text."""


class ClusteredPrompt(PromptInput):
    """A prompt, and what it is known to be, if anything."""

    label: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class ClustersRequest(BaseModel):
    """Prompts, each read at `positions`, and how many `clusters` of all states there shall be:
    without it the number from 2 to 16 whose silhouette is greatest. `exemplars` of each are told.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[
        tuple[ClusteredPrompt, ...], Field(min_length=2, max_length=MAX_PROMPTS, fail_fast=True)
    ]
    layer: Layer
    site: Site = "resid_post"
    positions: PositionChoice = (-1,)
    clusters: Annotated[int, Field(strict=True, ge=1, le=256)] | None = None
    linkage: Linkage = "ward"
    exemplars: Annotated[int, Field(strict=True, ge=1, le=32)] = 5
    steering: SteeringSpec | None = None


_MOST_CLUSTERS = 16


@dataclass(frozen=True)
class _Place:
    """Where a state was read."""

    number: int
    prompt: EncodedPrompt
    position: int
    label: str | None


def clusters(
    engine: Engine,
    request: ClustersRequest,
    *,
    plans: PlanCache | None = None,
    library: Library | None = None,  # noqa: ARG001
) -> ClustersResult:
    """The clusters of the states of all prompts, under `request.steering` where it has one.

    Raises `SteerError` with a pointer into the request: `too_few_states` for fewer states than
    clusters; `TooLarge` for more than `MAX_STATES`.
    """
    CLUSTERS.require(engine)
    point = HookPoint(request.layer, request.site)
    engine.info.check_point(HookPoint(request.layer), param="/layer")
    engine.info.check_point(point, param="/site")
    plan = plan_for(engine, request.steering, plans, at="/steering")
    places = _places(engine, request)
    states = _states(engine, places, point, plan)
    units = directions(states)
    cut = cut_tree(units, request.linkage, request.clusters, _MOST_CLUSTERS)
    labels = tuple(one.label for one in places)
    return ClustersResult(
        model=engine.info.name,
        site=request.site,
        layer=request.layer,
        linkage=request.linkage,
        clusters=_clusters(places, units, cut, request.exemplars),
        states=tuple(
            ClusteredState(prompt=one.number, position=one.position, cluster=number)
            for one, number in zip(places, cut.numbers, strict=True)
        ),
        silhouette=cut.silhouette,
        purity=purity(cut.numbers, labels),
        purity_by_chance=purity_by_chance(cut.numbers, labels),
        fingerprint=plan.fingerprint if plan else None,
    )


def _places(engine: Engine, request: ClustersRequest) -> list[_Place]:
    """The states to read, prompt by prompt."""
    found: list[_Place] = []
    for n, given in enumerate(request.prompts):
        prompt = encode_prompt(engine, given, at=pointer("prompts", n))
        for position in sorted(chosen_positions(engine, prompt, request.positions)):
            found.append(_Place(n, prompt, position, given.label))
        if len(found) > MAX_STATES:
            raise TooLarge(
                f"the first {n + 1} prompts give {len(found):,} states, and every pair of them is "
                f"compared: read at most {MAX_STATES:,}, of fewer prompts or positions",
                code="answer_too_large",
                param="/positions",
            )
    least = max(request.clusters or 2, 2)
    if len(found) < least:
        raise SpecError(
            f"{len(found)} states do not make {least} clusters: give more prompts or positions",
            param="/prompts",
            code="too_few_states",
        )
    return found


def _states(
    engine: Engine, places: Sequence[_Place], point: HookPoint, plan: SteeringPlan | None
) -> Float[Tensor, "n width"]:
    """The states at `places`, in their order; prompts that are read at the same positions run
    together."""
    of: dict[int, list[int]] = {}
    for n, one in enumerate(places):
        of.setdefault(one.number, []).append(n)
    together: dict[tuple[int, ...], list[list[int]]] = {}
    for rows in of.values():
        length = len(places[rows[0]].prompt.ids)
        # From the end, so that last tokens are the same place in texts of any length.
        at = tuple(places[n].position - length for n in rows)
        together.setdefault(at, []).append(rows)
    found: dict[int, Tensor] = {}
    for at, prompts in together.items():
        read = [places[rows[0]].prompt for rows in prompts]
        captured = engine.capture(
            CaptureRequest(
                [one.ids for one in read],
                (point,),
                at,
                [plan] * len(read),
                roles=[roles_for(plan, one) for one in read],
            )
        )
        for rows, given in zip(prompts, captured, strict=True):
            found.update(zip(rows, given.states[point].float().cpu(), strict=True))
    return torch.stack([found[n] for n in range(len(places))])


def _clusters(
    places: Sequence[_Place], units: Float[Tensor, "n width"], cut: Cut, exemplars: int
) -> tuple[StateCluster, ...]:
    numbers = torch.tensor(cut.numbers)
    means = torch.stack([units[numbers == k].mean(0) for k in range(cut.count)])
    middles = means / means.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    between = (middles @ middles.T).clamp(-1, 1)
    near = (units @ middles.T).clamp(-1, 1)
    found = []
    for k in range(cut.count):
        rows = (numbers == k).nonzero()[:, 0].tolist()
        nearest = sorted(rows, key=lambda n: (-float(near[n, k]), n))[:exemplars]
        labels = Counter(label for n in rows if (label := places[n].label) is not None)
        found.append(
            StateCluster(
                number=k,
                size=len(rows),
                similarity=float(near[rows, k].mean()),
                middles=tuple(between[k].tolist()),
                exemplars=tuple(_exemplar(places[n], float(near[n, k])) for n in nearest),
                labels=dict(sorted(labels.items(), key=lambda one: (-one[1], one[0]))) or None,
                purity=max(labels.values()) / labels.total() if labels else None,
            )
        )
    return tuple(found)


def _exemplar(place: _Place, similarity: float) -> Exemplar:
    tokens = place.prompt.tokens
    first = max(place.position + 1 - _SHOWN, 0)
    return Exemplar(
        prompt=place.number,
        position=place.position,
        token=tokens[place.position],
        text="".join(tokens[first : place.position + 1]),
        label=place.label,
        similarity=similarity,
    )


CLUSTERS = Inspection(
    name="clusters",
    summary="Clusters of the states of many prompts, with exemplars, and purity by labels.",
    request=ClustersRequest,
    result=ClustersResult,
    run=clusters,
    draw=clusters_heat_map,
    possible=reads_states,
)
