"""Jobs of the kind `sweep`: what a range of strengths of one vector does to the answers."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.errors import SteerError, TooLarge
from steer.fit.requests.measuring import MeasureRequest, SweepRequest
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.plan.resolve import Policy
from steer.registry.registry import Registry

MAX_ANSWERS = 20_000


def at_field(error: SteerError) -> SteerError:
    """`error` about a spec that was made of a job's parameters, said of the parameter."""
    field = (error.param or "").rpartition("/interventions/0/")[2].removeprefix("/").split("/")[0]
    field = "strengths" if field == "strength" else field
    error.param = f"/{field}" if field in ("strengths", "layers", "where") else "/vector"
    return error


def check_answers(answers: int, prompts: int) -> None:
    """Raises `TooLarge` for a job of more than `MAX_ANSWERS`."""
    if answers > MAX_ANSWERS:
        raise TooLarge(
            f"{prompts} prompts, at every strength or by every method and without steering, are "
            f"{answers} answers, and {MAX_ANSWERS} are allowed: send fewer",
            param="/prompts",
        )


def shown(request: MeasureRequest) -> dict[str, Any]:
    """How many prompts came, in their place."""
    return {"prompts": len(request.prompts)}


def sweep_kind(policy: Policy) -> JobKind[SweepRequest]:
    """Sweeps over the strengths that `policy` allows."""
    measuring = policy.measuring

    def check(engine: Engine, registry: Registry, request: SweepRequest) -> None:
        client_scorer(request.score, registry.vector)
        check_answers(request.answers, len(request.prompts))
        plans = plans_of(engine, registry, policy=measuring)
        try:
            for strength in request.strengths:
                plans.plan(request.spec(strength))
        except SteerError as error:
            raise at_field(error) from None

    def run(context: JobContext, request: SweepRequest) -> dict[str, Any]:
        response = request.run(
            context.engine,
            plans_of(context.engine, context.registry, policy=measuring),
            client_scorer(request.score, context.registry.vector),
            progress=context.counter(request.answers, "answers"),
        )
        vector = context.registry.entry("vector", request.vector)
        return {"vector": vector.id, "score": request.score, **response.as_json()}

    return JobKind(
        name="sweep",
        params=SweepRequest,
        run=run,
        check=check,
        summary="Measures what a vector does to the answers over a range of strengths.",
        data=frozenset({"prompts"}),
        shown=shown,
        repeatable=True,  # it only reads
    )
