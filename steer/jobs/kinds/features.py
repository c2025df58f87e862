"""Jobs about the features of an SAE: surveys, and contrasts of two sets of texts."""

from __future__ import annotations

from typing import Any

from steer.fit.requests.features import ContrastRequest, FeaturesRequest, SurveyRequest
from steer.jobs.kinds.kind import JobContext, JobKind


def _shown(request: FeaturesRequest) -> dict[str, Any]:
    """How many texts came, in their place."""
    return {name: len(getattr(request, name)) for name in request.data}


def _survey(context: JobContext, request: SurveyRequest) -> dict[str, Any]:
    found = request.run(
        context.engine,
        context.registry,
        context.scratch,
        progress=context.counter(request.texts, "texts"),
    )
    card = found.card
    fired = found.array("fired")
    return {
        **card.model_dump(exclude={"vocabulary", "data"}),
        "never_active": int((fired == 0).sum()),
        "active_per_token": float(fired.sum() / card.tokens),
    }


def _contrast(context: JobContext, request: ContrastRequest) -> dict[str, Any]:
    progress = context.counter(request.texts, "texts")
    return request.run(context.engine, context.registry, progress=progress).model_dump()


SURVEY = JobKind(
    name="sae/survey",
    params=SurveyRequest,
    run=_survey,
    check=lambda engine, registry, request: request.check(engine, registry),
    summary="Counts what every feature of an SAE does on texts, and keeps its best examples.",
    data=frozenset(SurveyRequest.data),
    shown=_shown,
    repeatable=True,  # the same survey again takes the first one's place
)
CONTRAST = JobKind(
    name="sae/contrast",
    params=ContrastRequest,
    run=_contrast,
    check=lambda engine, registry, request: request.check(engine, registry),
    summary="Finds the features of an SAE that tell two sets of texts apart.",
    data=frozenset(ContrastRequest.data),
    shown=_shown,
    repeatable=True,  # it only reads
)
