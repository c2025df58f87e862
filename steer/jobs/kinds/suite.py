"""Jobs of the kind `suite`: concepts × ways to steer × factors, rated, with their nulls."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.engines.gradients import differentiable
from steer.engines.plans import plans_of
from steer.errors import SteerError, pointer
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.fit.measure.suite.fitted import TRAINED
from steer.fit.measure.suite.way import Way, WayOf, known_ways
from steer.fit.requests.suite import SuiteRequest
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.evaluate import method_plan
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.sweep import check_answers
from steer.plan.resolve import Policy
from steer.registry.registry import Registry


def _scorers(registry: Registry, request: SuiteRequest) -> dict[str, Scorer | AnswerScorer]:
    request.check_scores()
    return {
        concept.name: client_scorer(
            str(concept.score),
            registry.vector,
            param=pointer("suite", "concepts", place, "score"),
        )
        for place, concept in enumerate(request.suite.concepts)
    }


def _ways(
    engine: Engine, registry: Registry, request: SuiteRequest, policy: Policy
) -> dict[str, WayOf]:
    """The methods that are not fitted; errors point at the method."""
    cache = plans_of(engine, registry, policy=policy)
    found: dict[str, WayOf] = {}
    for place, one in enumerate(request.methods):
        if one.fit is None:
            plans = {
                concept.name: method_plan(cache, registry, one.towards(concept.name), place)
                for concept in request.suite.concepts
            }
            found[one.name] = known_ways({name: Way.of(plan) for name, plan in plans.items()})
    return found


def _check_fits(engine: Engine, request: SuiteRequest) -> None:
    """Raises `Unsupported` at a method that this engine cannot fit."""
    for place, one in enumerate(request.methods):
        if one.fit in TRAINED:
            try:
                differentiable(engine)
            except SteerError as error:
                raise error.at(pointer("methods", place, "fit")) from None


def suite_kind(policy: Policy) -> JobKind[SuiteRequest]:
    """Suites of what `policy` allows."""

    def check(engine: Engine, registry: Registry, request: SuiteRequest) -> None:
        _scorers(registry, request)
        check_answers(request.answers, len(request.suite.prompts))
        _check_fits(engine, request)
        _ways(engine, registry, request, policy)

    def run(context: JobContext, request: SuiteRequest) -> dict[str, Any]:
        return request.run(
            context.engine,
            _ways(context.engine, context.registry, request, policy),
            scorers=_scorers(context.registry, request),
            progress=context.counter(request.answers, "answers"),
        ).as_json()

    return JobKind(
        name="suite",
        params=SuiteRequest,
        run=run,
        check=check,
        summary="Rates ways to steer on many concepts, for concept, instruction and fluency.",
        data=frozenset({"suite"}),
        shown=lambda request: {
            "suite": request.suite.name,
            "concepts": len(request.suite.concepts),
            "prompts": len(request.suite.prompts),
        },
        repeatable=True,  # it only reads
    )
