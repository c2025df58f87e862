"""Jobs of the kind `calibrate`: what each strength of a vector does, written onto its card."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from steer.artefacts.calibration import SafeLimits
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.measure.calibrate import calibrate, check_use, steps_of
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.sweep import GROUP, Strength, at_field, check_answers
from steer.prompts import PromptParam, prompt_of
from steer.registry.registry import Registry
from steer.spec import Where


class CalibrateParams(BaseModel):
    """Which vector, on which prompts, and where its safe range ends.

    Without a `score` (as in a sweep) only KL and perplexity are measured. `layers` and `where` are
    the card's unless given; given, they become its defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: Annotated[str, Field(min_length=1, max_length=256)]
    prompts: Annotated[tuple[PromptParam, ...], Field(min_length=1)]
    score: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1, max_length=64)] | None = None
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)] | None = None
    where: Where | None = None
    max_perplexity_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    min_valid: Annotated[float, Field(ge=0, le=1)] = 0.8
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


def _check(engine: Engine, registry: Registry, params: CalibrateParams) -> None:
    if params.score is not None:
        client_scorer(params.score, registry.vector)
    prompts = [prompt_of(prompt) for prompt in params.prompts]
    check_answers(steps_of(prompts, params.strengths), len(prompts))
    try:
        check_use(
            engine,
            registry.vector(params.vector),
            strengths=params.strengths,
            layers=params.layers,
            where=params.where,
        )
    except SteerError as error:
        raise at_field(error) from None


def _run(context: JobContext, params: CalibrateParams) -> dict[str, Any]:
    vectors = context.registry.vector
    prompts = [prompt_of(prompt) for prompt in params.prompts]
    plain = vectors(params.vector)
    found = calibrate(
        context.engine,
        plain,
        prompts,
        None if params.score is None else client_scorer(params.score, vectors),
        scorer_name=params.score,
        strengths=params.strengths,
        layers=params.layers,
        where=params.where,
        limits=SafeLimits(
            perplexity_ratio=params.max_perplexity_ratio,
            valid=params.min_valid,
            drop=params.max_drop,
        ),
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        group=GROUP,
        progress=context.counter(steps_of(prompts, params.strengths), "answers"),
    )
    entry, created = context.registry.add(plain.card.name, found.vector)
    return {
        **found.as_json(),
        "vector": entry.id,
        "version": entry.version,
        "sha256": entry.sha256,
        "created": created,
    }


CALIBRATE = JobKind(
    name="calibrate",
    params=CalibrateParams,
    run=_run,
    check=_check,
    data=frozenset({"prompts"}),
    shown=lambda params: {"prompts": len(params.prompts)},
    repeatable=True,  # the same content again is no new version
)
