"""Jobs of the kind `evaluate`: ways to steer compared with each other and with asking in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.errors import SteerError, pointer
from steer.fit.measure.evaluate import Instruction, Method, evaluate
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.sweep import GROUP, check_answers
from steer.plan.plan import SteeringPlan
from steer.prompts import PromptParam, prompt_of
from steer.registry.registry import Registry
from steer.spec import parse_spec


class MethodParam(BaseModel):
    """A way to steer under its name in the table: a spec, or a saved profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    steering: dict[str, Any] | None = None
    profile: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one(self) -> MethodParam:
        if (self.steering is None) == (self.profile is None):
            raise ValueError("a method is either a spec ('steering') or a 'profile'")
        return self


class EvaluateParams(BaseModel):
    """Which methods, on which prompts, by which score (as in a sweep).

    `instruction` is what the prompt-only baseline is told, such as "Answer in French.".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: Annotated[tuple[MethodParam, ...], Field(min_length=1, max_length=32)]
    prompts: Annotated[tuple[PromptParam, ...], Field(min_length=1)]
    score: Annotated[str, Field(min_length=1, max_length=4096)]
    instruction: Annotated[str, Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    examples: Annotated[int, Field(ge=0, le=16)] = 1

    @model_validator(mode="after")
    def _distinct(self) -> EvaluateParams:
        if len({method.name for method in self.methods}) < len(self.methods):
            raise ValueError("two methods have one name")
        return self

    @property
    def answers(self) -> int:
        """Those of the methods, of the unsteered model, and of the one that was told in words."""
        return len(self.prompts) * (2 + len(self.methods))


def _plans(
    engine: Engine, registry: Registry, methods: Sequence[MethodParam]
) -> list[SteeringPlan]:
    """The plan of each method; errors point at it."""
    plans = plans_of(engine, registry)
    found = []
    for place, method in enumerate(methods):
        at = pointer("methods", place, "profile" if method.steering is None else "steering")
        try:
            if method.steering is not None:
                spec = parse_spec(method.steering)
            else:
                spec = registry.profile(str(method.profile)).spec
            found.append(plans.plan(spec))
        except SteerError as error:
            error.param = at + (error.param or "") if method.steering is not None else at
            raise
    return found


def _check(engine: Engine, registry: Registry, params: EvaluateParams) -> None:
    client_scorer(params.score, registry.vector)
    check_answers(params.answers, len(params.prompts))
    _plans(engine, registry, params.methods)


def _run(context: JobContext, params: EvaluateParams) -> dict[str, Any]:
    plans = _plans(context.engine, context.registry, params.methods)
    found = evaluate(
        context.engine,
        [prompt_of(prompt) for prompt in params.prompts],
        [Method(one.name, plan) for one, plan in zip(params.methods, plans, strict=True)],
        client_scorer(params.score, context.registry.vector),
        instruction=Instruction(params.instruction),
        scorer_name=params.score,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        examples=params.examples,
        group=GROUP,
        progress=context.counter(params.answers, "answers"),
    )
    return found.as_json()


EVALUATE = JobKind(
    name="evaluate",
    params=EvaluateParams,
    run=_run,
    check=_check,
    data=frozenset({"prompts"}),
    shown=lambda params: {"prompts": len(params.prompts)},
    repeatable=True,  # it only reads
)
