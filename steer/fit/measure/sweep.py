"""Dose-response: what a range of strengths does to the model's answers.

All strengths run in one batch, next to the unsteered model, on the same prompts. The measure of
fluency is the model's own: the mean log-probability of the tokens it chose while it was steered.
An answer that repeats itself is confident too, so read it together with a scorer's `valid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steer.engines.base import Engine, SamplingParams
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import GROUP, Measured, answers_under, measured
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.plan.plan import SteeringPlan


@dataclass(frozen=True)
class Dose:
    """One strength and what it did; `perplexity_ratio` is against the unsteered model."""

    strength: float
    measured: Measured
    perplexity_ratio: float


@dataclass(frozen=True)
class DoseResponse:
    """A sweep over strengths, in order, and the unsteered model beside it."""

    unsteered: Measured
    doses: tuple[Dose, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "unsteered": asdict(self.unsteered),
            "doses": [
                {
                    "strength": dose.strength,
                    **asdict(dose.measured),
                    "perplexity_ratio": dose.perplexity_ratio,
                }
                for dose in self.doses
            ],
        }


def dose_response(
    engine: Engine,
    prompts: Sequence[Prompt],
    plan_at: Callable[[float], SteeringPlan],
    strengths: Sequence[float],
    scorer: AnswerScorer | Scorer,
    *,
    sampling: SamplingParams,
    examples: int = 0,
    group: int = GROUP,
    progress: Callable[[int], None] | None = None,
) -> DoseResponse:
    """Measures `plan_at(strength)` for every strength. Raises `SteerError` as the engine does."""
    plans = [None, *(plan_at(strength) for strength in strengths)]
    unsteered, *steered = measure(
        engine,
        prompts,
        plans,
        scorer,
        sampling=sampling,
        examples=examples,
        group=group,
        progress=progress,
    )
    doses = tuple(
        Dose(strength, one, math.exp(one.loss - unsteered.loss))
        for strength, one in zip(strengths, steered, strict=True)
    )
    return DoseResponse(unsteered, doses)


def measure(
    engine: Engine,
    prompts: Sequence[Prompt],
    plans: Sequence[SteeringPlan | None],
    scorer: AnswerScorer | Scorer,
    *,
    sampling: SamplingParams,
    examples: int = 0,
    group: int = GROUP,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """What each plan does to the answers, all plans and prompts in one rolling batch.

    Requests go to the engine `group` at a time; `progress` is told how many answers were just
    finished.
    """
    every = answers_under(
        engine,
        [prompts] * len(plans),
        plans,
        scorer,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    return [measured(answers, examples=examples) for answers in every]
