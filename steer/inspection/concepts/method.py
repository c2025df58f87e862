"""A vector-symbolic probe read on the prompts of a request (2509.25045): a registered one, or one
that is taught on the request's examples.

The states of a token at the upper layers are summed up by the centroids of a few clusters of
layers; a small network makes a code of them; a role asks it for its filler. What it finds on texts
that it was not taught stands in the answer, beside what a probe finds that was taught others'
pairs. One that is taught here is not kept: the same examples give the same probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.concepts.codebook import Codebook
from steer.artefacts.concepts.form import ProbeForm
from steer.artefacts.concepts.lesson import ProbeLesson
from steer.artefacts.concepts.network import CodeNetwork, summed_centroids
from steer.artefacts.concepts.probe import SITE, ConceptProbe
from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, pointer
from steer.inspection.concepts.request import TEACHING, ConceptExample, ConceptsRequest
from steer.inspection.concepts.result import (
    ConceptsResult,
    PromptReading,
    ReadFiller,
    RoleReading,
    concepts_heat_map,
)
from steer.inspection.method import Inspection
from steer.inspection.selection import chosen_points, registered
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import EncodedPrompt, Place, PromptInput, encode_prompt

_SHOWN = 3
Places = list[tuple[EncodedPrompt, int]]


def concepts(
    engine: Engine,
    request: ConceptsRequest,
    *,
    plans: PlanCache | None = None,  # noqa: ARG001
    library: Library | None = None,
) -> ConceptsResult:
    """Reads the prompts by the probe that the request names (`library` knows it), or by one that
    is taught and tried on its examples.

    Raises `SteerError` with a pointer into the request; `one_filler` where all examples together
    have a single filler, so that there is nothing to tell apart.
    """
    CONCEPTS.require(engine)
    if request.examples is None:
        assert request.probe is not None, "a request has one or the other"
        probe = _registered(engine, request, request.probe, library)
    else:
        probe = _taught(engine, request, request.examples)
    form, measures = probe.form, probe.form.measures
    position = form.position if request.position is None else request.position
    places = _places(engine, request.prompts, position, "prompts")
    said = f"{probe.card.name}@{probe.sha256[:12]}" if request.probe is not None else None
    return ConceptsResult(
        model=engine.info.name,
        probe=said,
        layers=probe.card.layers,
        dimensions=form.dimensions,
        fillers=len(form.fillers),
        trained=measures.trained if measures else None,
        held_out=measures.held_out if measures else None,
        accuracy=measures.accuracy if measures else None,
        shuffled=measures.shuffled if measures else None,
        commonest=measures.commonest if measures else None,
        random=math.sqrt(2 * math.log(max(len(form.fillers), 2)) / form.dimensions),
        roles=measures.roles if measures else (),
        readings=_readings(engine, probe, places, request.threshold),
    )


def _registered(
    engine: Engine, request: ConceptsRequest, name: str, library: Library | None
) -> ConceptProbe:
    for field in TEACHING:
        if field in request.model_fields_set:
            raise SpecError(
                f"'{field}' says how a probe is taught, and {name!r} has been: leave it "
                "out, or send examples in the place of 'probe'",
                param=f"/{field}",
                code="invalid_value",
            )
    probe = registered(engine, library, "probe", name, lambda known: known.probe)
    if probe.form.measures is None and not request.prompts:
        raise SpecError(
            f"the card of the probe {name!r} does not say how it does, so that without "
            "prompts there is nothing to tell: give 'prompts'",
            param="/prompts",
            code="invalid_value",
        )
    return probe


def _taught(
    engine: Engine, request: ConceptsRequest, examples: Sequence[ConceptExample]
) -> ConceptProbe:
    half = tuple(range(engine.info.n_layers // 2, engine.info.n_layers))
    points = chosen_points(engine, request.layers or half, SITE)
    codebook = Codebook(request.dimensions, request.seed)
    pairs = [dict(one.pairs) for one in examples]
    lesson = ProbeLesson.of(pairs, len(pairs) // request.held_out, codebook)
    position = -1 if request.position is None else request.position
    places = _places(engine, examples, position, "examples")
    inputs = torch.stack(
        [
            summed_centroids(states, request.clusters, request.seed)
            for states in _states(engine, places, points)
        ]
    )
    taught, shuffled = (
        CodeNetwork.fit(inputs[list(lesson.taught)], codes, request.seed)
        for codes in (lesson.codes(), lesson.shuffled_codes())
    )
    form = ProbeForm(
        roles=lesson.roles,
        fillers=lesson.fillers,
        dimensions=request.dimensions,
        clusters=request.clusters,
        position=position,
        seed=request.seed,
        measures=lesson.measured(inputs, taught, shuffled),
    )
    return ConceptProbe.of(taught, form=form, layers=tuple(point.layer for point in points))


def _places(engine: Engine, given: Sequence[PromptInput], position: Place, field: str) -> Places:
    """Each prompt with the position that is read."""
    prompts = [encode_prompt(engine, one, at=pointer(field, n)) for n, one in enumerate(given)]
    return [(prompt, prompt.position(position, param="/position")) for prompt in prompts]


def _states(
    engine: Engine, places: Places, points: Sequence[HookPoint]
) -> list[Float[Tensor, "layers width"]]:
    found = []
    for prompt, position in places:
        (captured,) = engine.capture(CaptureRequest([prompt.ids], tuple(points), (position,)))
        found.append(torch.stack([captured.states[point][0] for point in points]))
    return found


def _readings(
    engine: Engine, probe: ConceptProbe, places: Places, threshold: float
) -> tuple[PromptReading, ...]:
    if not places:
        return ()
    fillers, book = probe.form.fillers, probe.codebook
    codes = probe.code(torch.stack(_states(engine, places, probe.points)))
    best = {
        role: book.filler_cosines(codes, role, fillers).topk(min(_SHOWN, len(fillers)))
        for role in probe.form.roles
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
    return SITE in able.captures


CONCEPTS = Inspection(
    name="concepts",
    summary="Roles and fillers that states hold, by a registered probe or one taught on examples.",
    request=ConceptsRequest,
    result=ConceptsResult,
    run=concepts,
    draw=concepts_heat_map,
    possible=_possible,
)
