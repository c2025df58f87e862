"""What a vector does, beside nulls that move the model equally far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from steer.artefacts.calibration import MeasuredInterval, MeasuredNull, NullComparison
from steer.engines.base import Engine, SamplingParams
from steer.fit.data.prompt import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under
from steer.fit.measure.bootstrap import Floats, Interval, Ints, Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.directions import NullVector
from steer.fit.measure.nulls.matching import Match, matched_strengths
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.plan.plan import SteeringPlan

MATCHED_ANSWERS = 8
MATCHED_TOKENS = 24
"""What the KL is matched on, of the answers and of each: every null reads it several times, and
the vector's own KL is taken of the same."""

_DIGITS = 6

NullPlanAt: TypeAlias = Callable[[NullVector, float], SteeringPlan]
"""The plan that uses a null, at a strength, as its vector is used."""


@dataclass(frozen=True)
class Contender:
    """A vector that is held against `nulls`: its answers at `strength`, the plan that gave them,
    and how a null would take its place."""

    plan: SteeringPlan
    strength: float
    answers: Sequence[Answer]
    nulls: Sequence[NullVector]
    null_plan_at: NullPlanAt


@dataclass(frozen=True)
class NullRun:
    """A null at the strength that was matched, and its answers."""

    null: NullVector
    match: Match
    answers: Sequence[Answer]


def run_nulls(
    engine: Engine,
    prompts: Sequence[Prompt],
    references: References,
    contenders: Sequence[Contender],
    scorer: AnswerScorer | Scorer,
    *,
    sampling: SamplingParams,
    group: int = GROUP,
    progress: Progress | None = None,
) -> list[tuple[float, list[NullRun]]]:
    """For each contender its KL, and its nulls at strengths of that KL with their answers.

    `references` are of the unsteered answers to `prompts`; the first `MATCHED_ANSWERS` are used. All
    nulls of all contenders share batches. `progress` is told of `null_steps` in all. Raises
    `SteerError` as matching and the engine do.
    """
    matched_on = references.first(MATCHED_ANSWERS, MATCHED_TOKENS)
    kl = matched_on.divergences([one.plan for one in contenders]).mean(1).tolist()
    jobs = [(n, null) for n, one in enumerate(contenders) for null in one.nulls]
    matches = matched_strengths(
        matched_on,
        [_plan_at(contenders[n].null_plan_at, null) for n, null in jobs],
        [kl[n] for n, _ in jobs],
        start=[contenders[n].strength for n, _ in jobs],
        progress=progress,
    )
    answers = answers_under(
        engine,
        [prompts] * len(jobs),
        [
            contenders[n].null_plan_at(null, match.strength)
            for (n, null), match in zip(jobs, matches, strict=True)
        ],
        scorer,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    found: list[tuple[float, list[NullRun]]] = [(nats, []) for nats in kl]
    for (n, null), match, said in zip(jobs, matches, answers, strict=True):
        found[n][1].append(NullRun(null, match, said))
    return found


def null_steps(prompts: int, nulls: int) -> int:
    """How much `run_nulls` tells `progress` of: every match and every answer."""
    return nulls * (1 + prompts)


def compare(
    draws: Resamples,
    plain: Sequence[Answer],
    contender: Contender,
    kl: float,
    runs: Sequence[NullRun],
) -> NullComparison:
    """The comparison as it stands on a card and in reports, in six digits.

    `plain` are the unsteered answers to the same prompts, in order.
    """
    scores = values(contender.answers)
    baseline = values(plain)
    nulls = [values(run.answers) for run in runs]
    means = [_rounded(draws.mean(one).value) for one in nulls]
    own = _rounded(draws.mean(scores).value)
    margin = None
    if nulls:
        strongest = nulls[int(np.argmax(means))]
        margin = on_card(draws.difference(scores, strongest))
    return NullComparison(
        strength=_rounded(contender.strength),
        kl=_rounded(kl),
        score=own,
        unsteered=_rounded(draws.mean(baseline).value),
        nulls=tuple(
            MeasuredNull(
                kind=run.null.kind,
                seed=run.null.seed,
                cosine=_rounded(run.null.cosine),
                strength=_rounded(run.match.strength),
                kl=_rounded(run.match.kl),
                matched=run.match.reached,
                score=mean,
                anti_steered=_rounded(wrong_way(draws, baseline, one).value),
            )
            for run, one, mean in zip(runs, nulls, means, strict=True)
        ),
        p_value=_rounded(p_value(own, means)) if nulls else None,
        margin=margin,
        above_null=None if margin is None else margin.low > 0,
    )


def p_value(score: float, nulls: Sequence[float]) -> float:
    """The chance of a null at least as strong: (1 + nulls with a score ≥ `score`) / (1 + nulls).

    It is never below 1 / (1 + nulls): few nulls cannot say much.
    """
    return (1 + sum(one >= score for one in nulls)) / (1 + len(nulls))


def wrong_way(draws: Resamples, before: Sequence[float], after: Sequence[float]) -> Interval:
    """The share of prompts whose score fell from `before` to `after` (2407.12404); prompts that
    were not judged on both sides (NaN) do not count."""
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return draws.mean(np.where(np.isnan(change), np.nan, change < 0).tolist())


def anti_steered(
    draws: Resamples, strengths: Sequence[float], scores: Sequence[Sequence[float]]
) -> Interval:
    """The share of prompts that are steered the wrong way (2407.12404): those whose least-squares
    line of score over strength falls.

    `scores[n]` are those of all prompts at `strengths[n]`; NaN, where one was not judged, is left
    out of its prompt's line, and a prompt with fewer than two scores does not count.
    """
    x = np.asarray(strengths, dtype=np.float64)[:, None]
    y = np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(y)
    count = known.sum(0)
    centred = np.where(known, x - (x * known).sum(0) / np.maximum(count, 1), 0.0)
    slope = (centred * np.where(known, y, 0.0)).sum(0)
    falls = np.where(count < 2, np.nan, slope < -1e-12)
    return draws.mean(falls.tolist())


def values(answers: Sequence[Answer]) -> list[float]:
    """The score of each answer; NaN where it was not judged."""
    return [one.score.value if one.score.judged else math.nan for one in answers]


def on_card(interval: Interval) -> MeasuredInterval:
    """The interval in six digits, as cards and reports hold it."""
    return MeasuredInterval(
        value=_rounded(interval.value), low=_rounded(interval.low), high=_rounded(interval.high)
    )


def _plan_at(plan_at: NullPlanAt, null: NullVector) -> Callable[[float], SteeringPlan]:
    return lambda strength: plan_at(null, strength)


def _rounded(value: float) -> float:
    """Six digits, as on every card; 0 for the mean of nothing, as in `Measured`."""
    return 0.0 if math.isnan(value) else float(f"{value:.{_DIGITS}g}")
