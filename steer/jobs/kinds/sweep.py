"""Jobs of the kind `sweep`: what a range of strengths of one vector does to the answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.errors import SteerError, TooLarge
from steer.fit.measure.sweep import dose_response
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.prompts import PromptParam, prompt_of
from steer.registry.registry import Registry
from steer.spec import SteeringSpec, Where, parse_spec

MAX_ANSWERS = 20_000
GROUP = 16
"""Answers between two reports."""

Strength = Annotated[float, Field(allow_inf_nan=False)]


class SweepParams(BaseModel):
    """Which vector, on which prompts, at which strengths, and what counts.

    `score` is `regex:PATTERN`, `words:a,b,c` or `probe:VECTOR`. `layers` and `where` are the card's
    unless given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: Annotated[str, Field(min_length=1, max_length=256)]
    prompts: Annotated[tuple[PromptParam, ...], Field(min_length=1)]
    score: Annotated[str, Field(min_length=1, max_length=4096)]
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1, max_length=64)] = (
        0.25,
        0.5,
        0.75,
        1.0,
        1.5,
        2.0,
    )
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)] | None = None
    where: Where | None = None
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    examples: Annotated[int, Field(ge=0, le=16)] = 3

    @model_validator(mode="after")
    def _distinct(self) -> SweepParams:
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError("a strength is listed twice")
        return self

    def spec(self, strength: float) -> SteeringSpec:
        """The spec of one dose; raises `SpecError`."""
        item: dict[str, Any] = {"kind": "add", "vector": self.vector, "strength": strength}
        if self.layers is not None:
            item["layers"] = list(self.layers)
        if self.where is not None:
            item["where"] = self.where.model_dump(mode="json", by_alias=True, exclude_none=True)
        return parse_spec({"interventions": [item]})


def at_field(error: SteerError) -> SteerError:
    """`error` about a spec that was made of a job's parameters, said of the parameter."""
    field = (error.param or "").rpartition("/interventions/0/")[2].removeprefix("/").split("/")[0]
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


def _check(engine: Engine, registry: Registry, params: SweepParams) -> None:
    client_scorer(params.score, registry.vector)
    check_answers(len(params.prompts) * (1 + len(params.strengths)), len(params.prompts))
    try:
        plans_of(engine, registry).plan(params.spec(params.strengths[0]))
    except SteerError as error:
        raise at_field(error) from None


def _run(context: JobContext, params: SweepParams) -> dict[str, Any]:
    plans = plans_of(context.engine, context.registry)
    strengths = sorted(params.strengths)
    total = len(params.prompts) * (1 + len(strengths))
    response = dose_response(
        context.engine,
        [prompt_of(prompt) for prompt in params.prompts],
        lambda strength: plans.plan(params.spec(strength)),
        strengths,
        client_scorer(params.score, context.registry.vector),
        sampling=SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            seed=params.seed,
            logprobs=0,
        ),
        examples=params.examples,
        group=GROUP,
        progress=context.counter(total, "answers"),
    )
    vector = context.registry.entry("vector", params.vector)
    return {"vector": vector.id, "score": params.score, **response.as_json()}


SWEEP = JobKind(
    name="sweep",
    params=SweepParams,
    run=_run,
    check=_check,
    data=frozenset({"prompts"}),
    shown=lambda params: {"prompts": len(params.prompts)},
    repeatable=True,  # it only reads
)
