"""Jobs that may ask other models about features: those that the server's operator has named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer.engines.base import Engine
from steer.errors import Unsupported
from steer.fit.features.asked.answers import AskedWork
from steer.fit.features.asked.embedder import Embedder
from steer.fit.features.labeller import Labeller
from steer.fit.requests.features.embed import EmbedRequest
from steer.fit.requests.features.labels import LabelRequest
from steer.fit.requests.features.score import ScoreRequest
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.registry.registry import Registry


def named_embedder(embedder: Embedder | None) -> Embedder:
    """The embedder; raises `Unsupported` (`no_embedder`) where none was named."""
    if embedder is None:
        raise Unsupported(
            "this server has no embedder, so labels are found by their words alone: its operator "
            "names one with --embedder or STEER_EMBEDDER",
            code="no_embedder",
        )
    return embedder


def _named_labeller(labeller: Labeller | None) -> Labeller:
    if labeller is None:
        raise Unsupported(
            "this server has no labeller: leave 'ask_labeller' out, or have its operator name one "
            "with --labeller or STEER_LABELLER",
            param="/ask_labeller",
            code="no_labeller",
        )
    return labeller


def embed_kind(embedder: Embedder | None) -> JobKind[EmbedRequest]:
    """Embeds labels by `embedder`, so that they are found by their meaning."""

    def check(engine: Engine, registry: Registry, request: EmbedRequest) -> None:
        named_embedder(embedder)
        request.check(engine, registry)

    def run(context: JobContext, request: EmbedRequest) -> dict[str, Any]:
        asked = named_embedder(embedder)
        count = context.counter(len(context.registry.labels(request.sae)), "labels")
        return request.run(context.registry, asked, progress=count).model_dump()

    return JobKind(
        name="sae/embeddings",
        params=EmbedRequest,
        run=run,
        check=check,
        summary="Embeds the labels of an SAE's features, so that they are found by their meaning.",
        repeatable=True,  # what is embedded already is not embedded again
    )


def labels_kind(labeller: Labeller | None) -> JobKind[LabelRequest]:
    """Makes labels, by `labeller` where a client asks for its words."""

    def check(engine: Engine, registry: Registry, request: LabelRequest) -> None:
        request.check(engine, registry)
        if request.ask_labeller:
            request.check_labeller(registry, _named_labeller(labeller))

    def run(context: JobContext, request: LabelRequest) -> dict[str, Any]:
        if not request.ask_labeller:
            return request.run(context.registry).model_dump()
        total = request.questions(context.registry)
        count = context.counter(total, "questions")
        asked, work = _working(context, labeller, count)
        kept = request.run(context.registry, asked)
        work.finish(total)
        return {**kept.model_dump(), "asked": work.usage.model_dump()}

    return JobKind(
        name="sae/labels",
        params=LabelRequest,
        run=run,
        check=check,
        summary="Makes labels of features from what a survey saw, and keeps them beside the SAE.",
        data=frozenset({"features"}),
        shown=lambda one: {} if one.features is None else {"features": len(one.features)},
        repeatable=True,  # the same labels again take the first ones' place
        # The survey has read what is needed; but not every server has a labeller.
        any_model=lambda _, request: not request.ask_labeller,
    )


def score_kind(labeller: Labeller | None) -> JobKind[ScoreRequest]:
    """Scores labels, by `labeller` too where a client asks for its judgements."""

    def check(engine: Engine, registry: Registry, request: ScoreRequest) -> None:
        request.check(engine, registry)
        if request.ask_labeller:
            request.check_labeller(registry, _named_labeller(labeller))

    def run(context: JobContext, request: ScoreRequest) -> dict[str, Any]:
        steps = request.work(context.engine)
        if not request.ask_labeller:
            count = context.counter(steps, "answers")
            return request.run(context.engine, context.registry, progress=count).model_dump()
        count = context.counter(steps + request.questions, "answers and questions")
        asked, work = _working(context, labeller, count)
        found = request.run(context.engine, context.registry, asked, progress=count)
        work.finish(request.questions)
        return {**found.model_dump(), "asked": work.usage.model_dump()}

    return JobKind(
        name="sae/score",
        params=ScoreRequest,
        run=run,
        check=check,
        summary="Scores the labels of features: what they predict, and what raising the features "
        "does.",
        data=frozenset({"prompts"}),
        shown=lambda one: {} if one.prompts is None else {"prompts": len(one.prompts)},
        repeatable=True,  # the same scores again take the first ones' place
    )


def _working(
    context: JobContext, labeller: Labeller | None, count: Callable[[int], None]
) -> tuple[Labeller, AskedWork]:
    """The labeller for this job, which goes on from what an earlier attempt was told."""
    work = AskedWork(context.answers, count)
    return _named_labeller(labeller).working(work), work
