"""Nulls run: each at the strength of its vector's KL, on the same prompts, in shared batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steer.engines.base import Engine, SamplingParams
from steer.fit.data.prompt import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.directions import NullVector
from steer.fit.measure.nulls.in_plans import with_vector
from steer.fit.measure.nulls.matching import Match, PlanAt, matched_strengths
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.plan.plan import SteeringPlan

NULLS = 4
"""Nulls of each kind that calibrations and evaluations run unless told otherwise."""

MATCHED_ANSWERS = 8
MATCHED_TOKENS = 24
"""What the KL is matched on, of the answers and of each: every null reads it several times, and
the vector's own KL is taken of the same."""


@dataclass(frozen=True)
class Contender:
    """What is held against `nulls`: a plan that adds a vector at `strength`, and its answers."""

    plan: SteeringPlan
    strength: float
    answers: Sequence[Answer]
    nulls: Sequence[NullVector]

    def null_at(self, null: NullVector) -> PlanAt:
        """The plan with `null` in the vector's place, by its strength."""
        return lambda strength: with_vector(self.plan, null.vector, strength)


@dataclass(frozen=True)
class NullRun:
    """A null at the strength that was matched, and its answers."""

    null: NullVector
    match: Match
    answers: Sequence[Answer]


@dataclass(frozen=True)
class ContenderRuns:
    """The KL of a contender, in nats on what is matched, and the runs of its nulls."""

    kl: float
    nulls: tuple[NullRun, ...]

    def with_answers(self, answers: Sequence[Sequence[Answer]]) -> ContenderRuns:
        """The same runs with other answers, such as those that were scored later."""
        runs = zip(self.nulls, answers, strict=True)
        return replace(self, nulls=tuple(replace(run, answers=said) for run, said in runs))


def run_nulls(
    engine: Engine,
    prompts: Sequence[Prompt],
    references: References,
    contenders: Sequence[Contender],
    scorer: AnswerScorer | Scorer | None,
    *,
    sampling: SamplingParams,
    group: int = GROUP,
    progress: Progress | None = None,
) -> list[ContenderRuns]:
    """For each contender its KL, and its nulls at strengths of that KL with their answers.

    `references` are of the unsteered answers to `prompts`, of which the first `MATCHED_ANSWERS` are
    used. All nulls of all contenders share batches. `progress` is told of `null_steps` in all.
    Raises `SteerError` as matching and the engine do.
    """
    matched_on = references.first(MATCHED_ANSWERS, MATCHED_TOKENS)
    kl = matched_on.divergences([one.plan for one in contenders]).mean(1).tolist()
    every = [(n, null) for n, one in enumerate(contenders) for null in one.nulls]
    plans_at = [contenders[n].null_at(null) for n, null in every]
    matches = matched_strengths(
        matched_on,
        plans_at,
        [kl[n] for n, _ in every],
        start=[contenders[n].strength for n, _ in every],
        progress=progress,
    )
    answers = answers_under(
        engine,
        [prompts] * len(every),
        [plan_at(match.strength) for plan_at, match in zip(plans_at, matches, strict=True)],
        scorer,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    runs: list[list[NullRun]] = [[] for _ in contenders]
    for (n, null), match, said in zip(every, matches, answers, strict=True):
        runs[n].append(NullRun(null, match, said))
    return [ContenderRuns(nats, tuple(mine)) for nats, mine in zip(kl, runs, strict=True)]


def null_steps(prompts: int, nulls: int) -> int:
    """How much `run_nulls` tells `progress` of: every match and every answer."""
    return nulls * (1 + prompts)
