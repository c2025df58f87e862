"""The check: a vector on questions that had no part in making it, beside words and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.calibration import NullComparison
from steer.artefacts.control_vector import ControlVector
from steer.fit.data.pairs import Prompt
from steer.fit.make.asking import Interview
from steer.fit.make.trials import Trial, plan_of
from steer.fit.measure.answers import GROUP, Answer, answers_under, marked
from steer.fit.measure.bootstrap import Interval, Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.comparison import compare, values, wrong_way
from steer.fit.measure.nulls.directions import Refit, null_vectors
from steer.fit.measure.nulls.runs import Contender, null_steps, run_nulls
from steer.fit.measure.scoring import AnswerScorer, Scorer

MATCHED_ON = 5
"""Answers on which the nulls' KL is matched: each null reads them several times."""


@dataclass(frozen=True)
class CheckedRow:
    """A way to answer: mean score, share of sound answers (None where the scorer cannot tell), the
    share of questions whose score is below the unsteered one's; with 95 % bootstrap intervals."""

    name: str
    score: Interval
    valid: Interval | None
    wrong_way: Interval
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """The rows unsteered, told in words, and steered; what chance does at the vector's own KL; and
    the questions that the rows' examples answer."""

    rows: tuple[CheckedRow, ...]
    comparison: NullComparison
    over_words: Interval
    questions: int
    asked: tuple[str, ...]

    @property
    def steered(self) -> CheckedRow:
        return self.rows[-1]

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "nulls": self.comparison.model_dump(mode="json"),
            "over_words": asdict(self.over_words),
            "questions": self.questions,
        }


def check(
    interview: Interview,
    vector: ControlVector,
    trial: Trial,
    prompts: Sequence[Prompt],
    scorer: AnswerScorer | Scorer,
    *,
    states: Mapping[int, tuple[Tensor, Tensor]],
    refit: Refit,
    nulls: int,
    seed: int,
) -> Check:
    """Compares `vector`, used as in `trial`, on `prompts`: with the unsteered model, the model that
    is told in words, and `nulls` vectors of chance of each kind, drawn from `states` (those that
    the vector was fitted on) and `refit`."""
    engine, use = interview.engine, trial.use
    plan = plan_of(engine, vector, use, trial.strength)
    plain, told, steered = answers_under(
        engine,
        [prompts, [interview.told(one) for one in prompts], prompts],
        [None, None, plan],
        sampling=interview.sampling,
        group=GROUP,
        progress=interview.progress,
    )
    drawn = null_vectors(
        vector,
        nulls,
        seed=seed,
        layers=use.layers,
        states={layer: _within(*sides) for layer, sides in states.items()},
        refit=refit,
    )
    contender = Contender(plan, trial.strength, steered, drawn if nulls else ())
    [runs] = run_nulls(
        engine,
        prompts,
        References(engine, plain[:MATCHED_ON]),
        [contender],
        None,
        sampling=interview.sampling,
        progress=interview.progress,
    )
    plain, told, steered, *by_chance = marked(
        engine, scorer, [plain, told, steered, *(run.answers for run in runs.nulls)]
    )
    draws = Resamples.draw(len(prompts), seed=seed)
    return Check(
        rows=tuple(
            _row(name, draws, plain, answers)
            for name, answers in (("unsteered", plain), ("in words", told), ("steered", steered))
        ),
        comparison=compare(
            draws, plain, replace(contender, answers=steered), runs.with_answers(by_chance)
        ),
        over_words=draws.difference(values(steered), values(told)),
        questions=len(prompts),
        asked=tuple(engine.tokenizer.decode(one.prompt) for one in plain[:3]),
    )


def steps(prompts: int, nulls: int) -> int:
    """How much `check` tells the interview's `progress` of, with `nulls` in all."""
    return 3 * prompts + null_steps(prompts, nulls)


def _within(told: Tensor, opposed: Tensor) -> Tensor:
    """The states `[2n, d]` of both sides about their own means: with what sets the sides apart left
    in, a draw from their covariance would often be the vector itself."""
    return torch.cat([told - told.mean(0), opposed - opposed.mean(0)])


def _row(
    name: str, draws: Resamples, plain: Sequence[Answer], answers: Sequence[Answer]
) -> CheckedRow:
    valid = [one.score.valid for one in answers if one.score.judged]
    known = bool(valid) and None not in valid
    return CheckedRow(
        name=name,
        score=draws.mean(values(answers)),
        valid=draws.mean([float(bool(one.score.valid)) for one in answers]) if known else None,
        wrong_way=wrong_way(draws, values(plain), values(answers)),
        examples=tuple(one.text for one in answers[:3]),
    )
