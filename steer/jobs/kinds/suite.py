"""Jobs of the kind `suite`: concepts × ways to steer × factors, rated, with their nulls."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.errors import pointer
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.fit.requests.suite import SuiteRequest, towards
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.evaluate import method_plans
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.sweep import check_answers
from steer.plan.plan import SteeringPlan
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


def _plans(
    engine: Engine, registry: Registry, request: SuiteRequest, policy: Policy
) -> dict[tuple[str, str], SteeringPlan]:
    """The plan of each method towards each concept; errors point at the method."""
    found: dict[tuple[str, str], SteeringPlan] = {}
    for concept in request.suite.concepts:
        methods = [towards(one, concept.name) for one in request.methods]
        plans = method_plans(engine, registry, methods, policy)
        found |= {(one.name, concept.name): p for one, p in zip(methods, plans, strict=True)}
    return found


def suite_kind(policy: Policy) -> JobKind[SuiteRequest]:
    """Suites of what `policy` allows."""

    def check(engine: Engine, registry: Registry, request: SuiteRequest) -> None:
        _scorers(registry, request)
        check_answers(request.answers, len(request.suite.prompts))
        _plans(engine, registry, request, policy)

    def run(context: JobContext, request: SuiteRequest) -> dict[str, Any]:
        plans = _plans(context.engine, context.registry, request, policy)
        return request.run(
            context.engine,
            {
                one.name: lambda concept, name=one.name: plans[name, concept.name]  # type: ignore[misc]
                for one in request.methods
            },
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
