"""Jobs about the features of an SAE: surveys, and contrasts of two sets of texts."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.fit.requests.features import ContrastRequest, FeaturesRequest, SurveyRequest
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.registry.registry import Registry


def _check(engine: Engine, registry: Registry, request: FeaturesRequest) -> None:
    request.check(engine, registry)


def _shown(request: FeaturesRequest) -> dict[str, Any]:
    """How many texts came, in their place."""
    return {name: len(getattr(request, name)) for name in request.data}


def _survey(context: JobContext, request: SurveyRequest) -> dict[str, Any]:
    progress = context.counter(request.texts, "texts")
    return request.run(
        context.engine, context.registry, context.scratch, progress=progress
    ).counts()


def _contrast(context: JobContext, request: ContrastRequest) -> dict[str, Any]:
    progress = context.counter(request.texts, "texts")
    return request.run(context.engine, context.registry, progress=progress).model_dump()


SURVEY = JobKind(
    name="sae/survey",
    params=SurveyRequest,
    run=_survey,
    check=_check,
    summary="Counts what every feature of an SAE does on texts, and keeps its best examples.",
    data=frozenset(SurveyRequest.data),
    shown=_shown,
    repeatable=True,  # the same survey again takes the first one's place
)
CONTRAST = JobKind(
    name="sae/contrast",
    params=ContrastRequest,
    run=_contrast,
    check=_check,
    summary="Finds the features of an SAE that tell two sets of texts apart.",
    data=frozenset(ContrastRequest.data),
    shown=_shown,
    repeatable=True,  # it only reads
)
