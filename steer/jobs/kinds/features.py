"""Jobs about the features of an SAE: what they do on texts, and to what the model says."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.fit.requests.features.effect import EffectRequest
from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.features.suggest import SuggestRequest
from steer.fit.requests.features.texts import ContrastRequest, FeaturesRequest, SurveyRequest
from steer.fit.requests.features.trust import TrustRequest
from steer.fit.requests.inline import count
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.registry.registry import Registry


def _check(engine: Engine, registry: Registry, request: SAERequest) -> None:
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


def _effect(context: JobContext, request: EffectRequest) -> dict[str, Any]:
    progress = context.counter(request.work(), "directions")
    found = request.run(context.engine, context.registry, progress=progress)
    return {"features": [one.model_dump() for one in found]}


def _trust(context: JobContext, request: TrustRequest) -> dict[str, Any]:
    progress = context.counter(request.work(context.registry), "texts")
    found = request.run(context.engine, context.registry, progress=progress)
    return {"concepts": [one.model_dump() for one in found]}


def _suggest(context: JobContext, request: SuggestRequest) -> dict[str, Any]:
    progress = context.counter(request.work(context.engine), "answers")
    return request.run(context.engine, context.registry, progress=progress).model_dump()


def _questions(request: EffectRequest | SuggestRequest) -> dict[str, Any]:
    return {} if request.prompts is None else {"prompts": len(request.prompts)}


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
EFFECT = JobKind(
    name="sae/effect",
    params=EffectRequest,
    run=_effect,
    check=_check,
    summary="Measures whether features cause what the model says, beside directions of chance.",
    data=frozenset({"prompts"}),
    shown=_questions,
    repeatable=True,  # the same finding again takes the first one's place
)
TRUST = JobKind(
    name="sae/trust",
    params=TrustRequest,
    run=_trust,
    check=_check,
    summary="Measures how purely features stand for the labels of texts: FMS and absorption.",
    data=frozenset({"texts", "data"}),
    shown=lambda request: {"texts": count(request.texts, request.data)},
    repeatable=True,  # the same finding again takes the first one's place
)
SUGGEST = JobKind(
    name="sae/suggest",
    params=SuggestRequest,
    run=_suggest,
    check=_check,
    summary="Finds the features that do what a sentence asks for, with specs that clamp them.",
    data=frozenset({"prompts"}),
    shown=_questions,
    repeatable=True,  # it only reads
)
