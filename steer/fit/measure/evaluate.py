"""Evaluation: ways to steer compared on the same prompts, with asking in words beside them.

A vector is worth its trouble only if it does what a sentence in the prompt does not, or does it
better. So every comparison has two rows of its own: the unsteered model, and the prompt-only
baseline, the unsteered model that was told in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from steer.artefacts.calibration import NullComparison
from steer.artefacts.control_vector import Card
from steer.engines.base import Engine, SamplingParams
from steer.errors import SteerError
from steer.fit.data.instruction import PLACEMENTS, Placement, Telling
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under, sound
from steer.fit.measure.bootstrap import LEVEL, Floats, Interval, Ints, Resamples
from steer.fit.measure.nulls.comparison import (
    SteeredAnswers,
    compare_plans,
    values,
    wrong_way,
)
from steer.fit.measure.nulls.runs import NULLS, null_steps
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.plan.plan import SteeringPlan

UNSTEERED = "unsteered"
PROMPT_ONLY = "prompt only"


@dataclass(frozen=True)
class ComparedMethod:
    """A way to steer, under the name it has in the table."""

    name: str
    plan: SteeringPlan


@dataclass(frozen=True)
class Instruction:
    """What the prompt-only baseline is told, where that text comes from, and where it is told:
    a model may pass over its system message and follow what stands after the question."""

    text: str
    source: Literal["given", "card instruction", "card description"] = "given"
    place: Placement = "system"

    def __str__(self) -> str:
        return f"“{self.text}” ({self.source}, {_PLACES[self.place]})"


_PLACES: Mapping[Placement, str] = {
    "system": "in the system message",
    "after": "after the question",
    "before": "before the question",
}


@dataclass(frozen=True)
class EvaluatedRow:
    """One method's figures, each with its bootstrap interval.

    `score`, `valid` and `both` are as in `Measured`; `perplexity_ratio` is that of the answers, by
    the model that wrote them, to the unsteered ones; `over_prompt` is the score less that of the
    prompt-only baseline, paired by prompt; `anti_steered` is the share of prompts whose score is
    below the unsteered one's (2407.12404). `nulls` is what vectors of chance do in the method's
    place at the same KL, `no_nulls` why that was not measured.
    """

    name: str
    kind: Literal["unsteered", "prompt", "steering"]
    answers: int
    unjudged: int
    score: Interval
    valid: Interval | None
    both: Interval | None
    perplexity_ratio: Interval
    over_prompt: Interval
    anti_steered: Interval
    examples: tuple[str, ...]
    nulls: NullComparison | None = None
    no_nulls: str | None = None

    def as_json(self) -> dict[str, Any]:
        nulls = None if self.nulls is None else self.nulls.model_dump(mode="json")
        return asdict(replace(self, nulls=None)) | {"nulls": nulls}


@dataclass(frozen=True)
class Evaluation:
    """A comparison: the unsteered model, the prompt-only baseline, then the methods in order."""

    rows: tuple[EvaluatedRow, ...]
    instruction: Instruction
    prompts: int
    seed: int
    resamples: int
    scorer: str | None = None

    def as_json(self) -> dict[str, Any]:
        rows = [row.as_json() for row in self.rows]
        return {**asdict(replace(self, rows=())), "level": LEVEL, "rows": rows}


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    methods: Sequence[ComparedMethod],
    scorer: AnswerScorer | Scorer,
    *,
    instruction: Instruction,
    scorer_name: str | None = None,
    max_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    nulls: int = NULLS,
    resamples: int = 2000,
    examples: int = 1,
    group: int = GROUP,
    progress: Progress | None = None,
) -> Evaluation:
    """Compares `methods` on `prompts`, the prompt-only baseline always among them.

    All answers share the engine's batch. Beside each method that adds a vector stand `nulls`
    vectors of chance of each kind, at the method's own KL. `seed` draws the samples (above
    temperature 0), the nulls and the bootstrap's prompts. `progress` is told of finished steps,
    `evaluation_steps` in all; what it raises ends the work. Raises `SteerError`: `no_prompts`,
    `invalid_option`.
    """
    _check(prompts, methods)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, logprobs=0)
    told = list(map(Telling(instruction.text, instruction.place), prompts))
    plain, asked, *steered = answers_under(
        engine,
        [prompts, told, *[prompts] * len(methods)],
        [None, None, *(method.plan for method in methods)],
        scorer,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    draws = Resamples.draw(len(prompts), resamples=resamples, seed=seed)
    compared = compare_plans(
        engine,
        prompts,
        plain,
        [SteeredAnswers(one.plan, said) for one, said in zip(methods, steered, strict=True)],
        scorer,
        draws=draws,
        sampling=sampling,
        count=nulls,
        seed=seed,
        group=group,
        progress=progress,
    )
    table = _Table(draws, plain, asked, examples)
    rows = [table.row(UNSTEERED, "unsteered", plain), table.row(PROMPT_ONLY, "prompt", asked)]
    rows += [
        table.row(method.name, "steering", answers, beside)
        for method, answers, beside in zip(methods, steered, compared, strict=True)
    ]
    return Evaluation(tuple(rows), instruction, len(prompts), seed, resamples, scorer_name)


def evaluation_steps(prompts: int, methods: int, nulls: int = NULLS) -> int:
    """How much `evaluate` tells `progress` of: every answer, and the nulls of every method."""
    return prompts * (2 + methods) + methods * null_steps(prompts, 2 * nulls)


def card_instruction(card: Card) -> Instruction | None:
    """What a card says about how to ask for its attribute in words; None where it says nothing.

    `provenance["instruction"]` is meant for this, told at `provenance["place"]` if that is there;
    the description is the next best.
    """
    said, at = card.provenance.get("instruction"), card.provenance.get("place")
    if isinstance(said, str) and said:
        place: Placement = next((one for one in PLACEMENTS if one == at), "system")
        return Instruction(said, "card instruction", place)
    return Instruction(card.description, "card description") if card.description else None


@dataclass(frozen=True)
class _Table:
    """What every row is measured against."""

    draws: Resamples
    plain: Sequence[Answer]
    asked: Sequence[Answer]
    examples: int

    def row(
        self,
        name: str,
        kind: Literal["unsteered", "prompt", "steering"],
        answers: Sequence[Answer],
        beside: NullComparison | str | None = None,
    ) -> EvaluatedRow:
        judged = [answer.score for answer in answers if answer.score.judged]
        judges = bool(judged) and all(score.valid is not None for score in judged)
        valid = [float(bool(a.score.valid)) if a.score.judged else math.nan for a in answers]
        both = [sound(a.score) if a.score.judged else math.nan for a in answers]
        return EvaluatedRow(
            name=name,
            kind=kind,
            answers=len(answers),
            unjudged=len(answers) - len(judged),
            score=self.draws.mean(values(answers)),
            valid=self.draws.mean(valid) if judges else None,
            both=self.draws.mean(both) if judges else None,
            perplexity_ratio=perplexity_ratio(self.draws, answers, self.plain),
            over_prompt=self.draws.difference(values(answers), values(self.asked)),
            anti_steered=wrong_way(self.draws, values(self.plain), values(answers)),
            examples=tuple(answer.text for answer in answers[: self.examples]),
            nulls=beside if isinstance(beside, NullComparison) else None,
            no_nulls=beside if isinstance(beside, str) else None,
        )


def perplexity_ratio(
    draws: Resamples, steered: Sequence[Answer], plain: Sequence[Answer]
) -> Interval:
    """exp of the difference of the mean losses over all tokens, resampled by prompt."""
    ours, theirs = _losses(steered), _losses(plain)

    def ratio(rows: Ints) -> Floats:
        a, b = ours[:, rows].sum(-1), theirs[:, rows].sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            difference: Floats = a[0] / a[1] - b[0] / b[1]
        return np.exp(difference)

    return draws.interval(ratio)


def _losses(answers: Sequence[Answer]) -> Floats:
    """The summed loss and the number of tokens of each answer, `[2, answers]`."""
    return np.array([[sum(a.losses) for a in answers], [len(a.losses) for a in answers]], float)


def _check(prompts: Sequence[Prompt], methods: Sequence[ComparedMethod]) -> None:
    if not prompts:
        raise SteerError("there is nothing to compare on: give prompts", code="no_prompts")
    names = [UNSTEERED, PROMPT_ONLY, *(method.name for method in methods)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not methods:
        raise SteerError(
            f"two rows would be named {twice[0]!r}: give each method a name of its own"
            if twice
            else "there is nothing to compare: give at least one method",
            code="invalid_option",
        )
