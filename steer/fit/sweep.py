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

from steer.engines.base import Completion, Engine, GenerationRequest, SamplingParams
from steer.fit.pairs import Prompt, render
from steer.fit.scoring import Score, Scorer
from steer.plan import SteeringPlan

GROUP = 256
"""Requests handed to the engine at once; they share its rolling batch."""


@dataclass(frozen=True)
class Measured:
    """The answers to all prompts under one plan.

    `score` is the mean of the scorer's values, `valid` the share of valid texts, `both` the mean
    value with invalid texts counted as 0 (both None where the scorer does not judge validity),
    `loss` the mean of −log p over all generated tokens, in nats.
    """

    answers: int
    score: float
    loss: float
    valid: float | None = None
    both: float | None = None
    examples: tuple[str, ...] = ()


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
    scorer: Scorer,
    *,
    sampling: SamplingParams,
    examples: int = 0,
    group: int = GROUP,
    progress: Callable[[int], None] | None = None,
) -> DoseResponse:
    """Measures `plan_at(strength)` for every strength. Raises `SteerError` as the engine does."""
    plans = [None, *(plan_at(strength) for strength in strengths)]
    unsteered, *measured = measure(
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
        for strength, one in zip(strengths, measured, strict=True)
    )
    return DoseResponse(unsteered, doses)


def measure(
    engine: Engine,
    prompts: Sequence[Prompt],
    plans: Sequence[SteeringPlan | None],
    scorer: Scorer,
    *,
    sampling: SamplingParams,
    examples: int = 0,
    group: int = GROUP,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """What each plan does to the answers, all plans and prompts in one rolling batch.

    Requests go to the engine `group` at a time, which bounds memory and feeds `progress`
    with the number of answers just finished.
    """
    tokens = [tuple(render(engine.tokenizer, prompt)) for prompt in prompts]
    requests = [
        GenerationRequest(f"sweep-{row}-{column}", prompt, sampling, plan)
        for row, plan in enumerate(plans)
        for column, prompt in enumerate(tokens)
    ]
    completions: list[Completion] = []
    for first in range(0, len(requests), group):
        together = requests[first : first + group]
        completions += engine.complete(together)
        if progress is not None:
            progress(len(together))
    count = len(tokens)
    return [
        _measured(engine, completions[row * count : (row + 1) * count], scorer, examples)
        for row in range(len(plans))
    ]


def _measured(
    engine: Engine, completions: Sequence[Completion], scorer: Scorer, examples: int
) -> Measured:
    texts = [
        str(engine.tokenizer.decode(list(one.tokens), skip_special_tokens=True))
        for one in completions
    ]
    scores = [scorer(text) for text in texts]
    losses = [-entry.logprob for one in completions for entry in one.logprobs]
    judged = all(score.valid is not None for score in scores)
    return Measured(
        answers=len(scores),
        score=_mean([score.value for score in scores]),
        loss=_mean(losses),
        valid=_mean([float(bool(score.valid)) for score in scores]) if judged else None,
        both=_mean([_sound(score) for score in scores]) if judged else None,
        examples=tuple(texts[:examples]),
    )


def _sound(score: Score) -> float:
    return score.value if score.valid else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
