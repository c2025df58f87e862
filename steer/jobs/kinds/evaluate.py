"""Jobs of the kind `evaluate`: ways to steer compared with each other and with asking in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.errors import SteerError, pointer
from steer.fit.requests.measuring import EvaluateRequest, MethodParam
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.sweep import check_answers, shown
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.plan.resolve import Policy
from steer.registry.registry import Registry
from steer.spec import parse_spec


def method_plan(
    plans: PlanCache, registry: Registry, method: MethodParam, place: int
) -> SteeringPlan:
    """The plan of the method at `place` of a request, as a chat gets it; errors point at it."""
    at = pointer("methods", place, "profile" if method.steering is None else "steering")
    try:
        if method.steering is None:
            return plans.plan(registry.profile(str(method.profile)).spec)
        return plans.plan(parse_spec(method.steering))
    except SteerError as error:
        error.param = at if method.steering is None else at + (error.param or "")
        raise


def method_plans(
    engine: Engine, registry: Registry, methods: Sequence[MethodParam], policy: Policy
) -> list[SteeringPlan]:
    """The plan of each method of a request."""
    plans = plans_of(engine, registry, policy=policy)
    return [method_plan(plans, registry, one, place) for place, one in enumerate(methods)]


def evaluate_kind(policy: Policy) -> JobKind[EvaluateRequest]:
    """Comparisons of what `policy` allows."""

    def check(engine: Engine, registry: Registry, request: EvaluateRequest) -> None:
        client_scorer(request.score, registry.vector)
        check_answers(request.answers, len(request.prompts))
        method_plans(engine, registry, request.methods, policy)

    def run(context: JobContext, request: EvaluateRequest) -> dict[str, Any]:
        return request.run(
            context.engine,
            method_plans(context.engine, context.registry, request.methods, policy),
            client_scorer(request.score, context.registry.vector),
            progress=context.counter(request.answers, "answers"),
        ).as_json()

    return JobKind(
        name="evaluate",
        params=EvaluateRequest,
        run=run,
        check=check,
        summary="Compares ways to steer, with asking in words beside them.",
        data=frozenset({"prompts"}),
        shown=shown,
        repeatable=True,  # it only reads
    )
