"""A vector-symbolic probe, taught on the examples of a request and read on its prompts
(2509.25045).

The states of a token at the upper layers are summed up by the centroids of a few clusters of
layers; a small network makes a code of them; a role asks it for its filler. Nothing is kept: the
same examples give the same probe. What it finds on texts that it was not taught stands in the
answer, beside what a probe finds that was taught others' pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, pointer
from steer.inspection.concepts.codebook import DIMENSIONS, Codebook
from steer.inspection.concepts.probe import CodeProbe, summed_centroids
from steer.inspection.concepts.result import (
    ConceptsResult,
    PromptReading,
    ReadFiller,
    RoleAccuracy,
    RoleReading,
    concepts_heat_map,
)
from steer.inspection.method import Inspection
from steer.inspection.selection import LayerChoice, chosen_points
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import EncodedPrompt, Place, PromptInput, encode_prompt

_LEAST = 10
_SHOWN = 3

ConceptName = Annotated[str, Field(min_length=1, max_length=128)]


class ConceptExample(PromptInput):
    """A text and what it says: fillers by their roles, such as {"country": "France"}."""

    pairs: Annotated[dict[ConceptName, ConceptName], Field(min_length=1, max_length=16)]


class ConceptsRequest(BaseModel):
    """Examples to teach and try the probe with, and `prompts` to read; all are read at `position`,
    after `layers` (by default the upper half of the model).

    One in `held_out` examples tries the probe. A filler counts as found where its cosine is above
    `threshold`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: Annotated[
        tuple[ConceptExample, ...], Field(min_length=_LEAST, max_length=2048, fail_fast=True)
    ]
    prompts: Annotated[tuple[PromptInput, ...], Field(max_length=256, fail_fast=True)] = ()
    layers: LayerChoice | None = None
    position: Place = -1
    clusters: Annotated[int, Field(strict=True, ge=1, le=64)] = 5
    dimensions: Annotated[int, Field(strict=True, ge=256, le=16_384)] = DIMENSIONS
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    held_out: Annotated[int, Field(strict=True, ge=2, le=10)] = 5
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0


@dataclass(frozen=True)
class _Split:
    """Which examples teach and which try, by number."""

    taught: tuple[int, ...]
    tried: tuple[int, ...]

    @staticmethod
    def of(count: int, one_in: int, seed: int) -> _Split:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(count // one_in, 1)
        return _Split(tuple(sorted(order[held:])), tuple(sorted(order[:held])))


def concepts(
    engine: Engine,
    request: ConceptsRequest,
    *,
    plans: PlanCache | None = None,  # noqa: ARG001
    library: Library | None = None,  # noqa: ARG001
) -> ConceptsResult:
    """Fits the probe, tries it and reads the prompts.

    Raises `SteerError` with a pointer into the request; `one_filler` where all examples together
    have a single filler, so that there is nothing to tell apart.
    """
    CONCEPTS.require(engine)
    half = tuple(range(engine.info.n_layers // 2, engine.info.n_layers))
    points = chosen_points(engine, request.layers or half, "resid_post")
    pairs = [dict(one.pairs) for one in request.examples]
    fillers = sorted({filler for one in pairs for filler in one.values()})
    if len(fillers) < 2:
        raise SpecError(
            f"all examples have the one filler {fillers[0]!r}: a probe tells fillers apart",
            param="/examples",
            code="one_filler",
        )
    inputs, _ = _inputs(engine, request, request.examples, points, "examples")
    read, places = _inputs(engine, request, request.prompts, points, "prompts")
    split = _Split.of(len(pairs), request.held_out, request.seed)
    codebook = Codebook(request.dimensions, request.seed)
    probe = _fitted(codebook, inputs, pairs, split, request.seed)
    shuffled = _fitted(codebook, inputs, _shuffled(pairs, split, request.seed), split, request.seed)
    tried = [inputs[n] for n in split.tried]
    codes = [one.code(torch.stack(tried)) for one in (probe, shuffled)]
    roles = sorted({role for one in pairs for role in one})
    by_role = [_accuracy(codebook, codes, pairs, split, role, fillers) for role in roles]
    total = sum(one.pairs for one in by_role)

    def over_all(name: str) -> float | None:
        parts = [(getattr(one, name), one.pairs) for one in by_role if one.pairs]
        return sum(share * count for share, count in parts) / total if total else None

    return ConceptsResult(
        model=engine.info.name,
        layers=tuple(point.layer for point in points),
        dimensions=request.dimensions,
        fillers=len(fillers),
        trained=len(split.taught),
        held_out=len(split.tried),
        accuracy=over_all("accuracy"),
        shuffled=over_all("shuffled"),
        commonest=over_all("commonest"),
        random=math.sqrt(2 * math.log(len(fillers)) / request.dimensions),
        roles=tuple(by_role),
        readings=_readings(codebook, probe, read, places, roles, fillers, request.threshold),
    )


def _inputs(
    engine: Engine,
    request: ConceptsRequest,
    given: Sequence[PromptInput],
    points: tuple[HookPoint, ...],
    field: str,
) -> tuple[list[Float[Tensor, " width"]], list[tuple[EncodedPrompt, int]]]:
    """What the probe is given of each prompt, and where it was read."""
    found, places = [], []
    for n, one in enumerate(given):
        prompt = encode_prompt(engine, one, at=pointer(field, n))
        position = prompt.position(request.position, param="/position")
        places.append((prompt, position))
    for prompt, position in places:
        (captured,) = engine.capture(CaptureRequest([prompt.ids], points, (position,)))
        states = torch.stack([captured.states[point][0] for point in points])
        found.append(summed_centroids(states, request.clusters, request.seed))
    return found, places


def _fitted(
    codebook: Codebook,
    inputs: Sequence[Float[Tensor, " width"]],
    pairs: Sequence[Mapping[str, str]],
    split: _Split,
    seed: int,
) -> CodeProbe:
    codes = torch.stack([codebook.bundle(pairs[n]) for n in split.taught])
    return CodeProbe.fit(torch.stack([inputs[n] for n in split.taught]), codes, seed)


def _shuffled(
    pairs: Sequence[Mapping[str, str]], split: _Split, seed: int
) -> list[Mapping[str, str]]:
    """The same pairs, those of the taught texts given to one another."""
    order = torch.randperm(len(split.taught), generator=torch.Generator().manual_seed(seed + 1))
    found = list(pairs)
    for n, other in zip(split.taught, order.tolist(), strict=True):
        found[n] = pairs[split.taught[other]]
    return found


def _accuracy(
    codebook: Codebook,
    codes: Sequence[Float[Tensor, "tried dimensions"]],
    pairs: Sequence[Mapping[str, str]],
    split: _Split,
    role: str,
    fillers: Sequence[str],
) -> RoleAccuracy:
    """Of the probe and the shuffled one, whose `codes` of the held-out texts these are."""
    taught = Counter(pairs[n][role] for n in split.taught if role in pairs[n])
    asked = [(k, pairs[n][role]) for k, n in enumerate(split.tried) if role in pairs[n]]
    known = [(k, filler) for k, filler in asked if filler in taught]
    if not known:
        return RoleAccuracy(role=role, pairs=0, unseen=len(asked))
    rights = []
    for one in codes:
        best = codebook.filler_cosines(one, role, fillers).argmax(-1).tolist()
        rights.append(sum(fillers[best[k]] == filler for k, filler in known) / len(known))
    often = min(taught, key=lambda name: (-taught[name], name))
    return RoleAccuracy(
        role=role,
        pairs=len(known),
        unseen=len(asked) - len(known),
        accuracy=rights[0],
        shuffled=rights[1],
        commonest=sum(filler == often for _, filler in known) / len(known),
    )


def _readings(
    codebook: Codebook,
    probe: CodeProbe,
    inputs: Sequence[Float[Tensor, " width"]],
    places: Sequence[tuple[EncodedPrompt, int]],
    roles: Sequence[str],
    fillers: Sequence[str],
    threshold: float,
) -> tuple[PromptReading, ...]:
    if not inputs:
        return ()
    codes = probe.code(torch.stack(list(inputs)))
    best = {
        role: codebook.filler_cosines(codes, role, fillers).topk(min(_SHOWN, len(fillers)))
        for role in roles
    }
    return tuple(
        PromptReading(
            token=prompt.tokens[position],
            position=position,
            roles=tuple(
                RoleReading(
                    role=role,
                    found=bool(found.values[n, 0] > threshold),
                    fillers=tuple(
                        ReadFiller(filler=fillers[place], cosine=cosine)
                        for place, cosine in zip(
                            found.indices[n].tolist(), found.values[n].tolist(), strict=True
                        )
                    ),
                )
                for role, found in best.items()
            ),
        )
        for n, (prompt, position) in enumerate(places)
    )


def _possible(able: Capabilities) -> bool:
    return "resid_post" in able.captures


CONCEPTS = Inspection(
    name="concepts",
    summary="Roles and fillers that states hold, by a probe taught on the request's examples.",
    request=ConceptsRequest,
    result=ConceptsResult,
    run=concepts,
    draw=concepts_heat_map,
    possible=_possible,
)
