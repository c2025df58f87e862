"""Answers of a model under plans: the one way to ask for them, for data and for measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from steer.engines.base import Completion, Engine, GenerationRequest, SamplingParams
from steer.engines.selecting import roles_under
from steer.fit.measure.scoring import AnswerScorer, Score, Scorer
from steer.plan.plan import SteeringPlan
from steer.prompts import Prompt, answer_text, render

Progress: TypeAlias = Callable[[int], None]

GROUP = 256
"""Requests handed to the engine at once; they share its rolling batch."""


UNSCORED = Score(0.0)
"""What answers that nobody scores have for a score."""


@dataclass(frozen=True)
class Answer:
    """What the model said to a prompt, as tokens and as text; `losses` holds −log p of each token,
    in nats, under the model that chose it. `ended` is whether it came to its end by itself, `asked`
    the prompt as it was given, where that is known."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    losses: tuple[float, ...] = ()
    score: Score = UNSCORED
    ended: bool = False
    asked: Prompt | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Measured:
    """The answers to all prompts under one plan.

    `score` is the mean of the scorer's values, `valid` the share of valid texts, `both` the mean
    value with invalid texts counted as 0 (both None where the scorer does not judge validity),
    `loss` the mean of −log p over all generated tokens, in nats. `unjudged` counts the answers that
    the scorer could not judge, which are in none of the means.
    """

    answers: int
    score: float
    loss: float
    valid: float | None = None
    both: float | None = None
    unjudged: int = 0
    examples: tuple[str, ...] = ()


def _request(
    engine: Engine,
    name: str,
    prompt: Prompt,
    plan: SteeringPlan | None,
    sampling: SamplingParams,
) -> GenerationRequest:
    roles = roles_under(engine, plan, prompt)
    tokens = tuple(render(engine.tokenizer, prompt))
    return GenerationRequest(name, tokens, sampling, plan, roles=roles)


def answers_under(
    engine: Engine,
    prompts: Sequence[Sequence[Prompt]],
    plans: Sequence[SteeringPlan | None],
    scorer: AnswerScorer | Scorer | None = None,
    *,
    sampling: SamplingParams,
    group: int = GROUP,
    progress: Progress | None = None,
) -> list[tuple[Answer, ...]]:
    """The answers to `prompts[n]` under `plans[n]`, for each n, scored where there is a `scorer`.

    Requests go to the engine `group` at a time, which bounds memory and feeds `progress` with the
    number of answers just finished; what `progress` raises ends the work. `sampling` should ask
    for log-probabilities (`logprobs=0`), or there are no losses.
    """
    requests = [
        _request(engine, f"answer-{row}-{column}", prompt, plan, sampling)
        for row, (plan, asked) in enumerate(zip(plans, prompts, strict=True))
        for column, prompt in enumerate(asked)
    ]
    given = [prompt for asked in prompts for prompt in asked]
    completions: list[Completion] = []
    for first in range(0, len(requests), group):
        together = requests[first : first + group]
        completions += engine.complete(together)
        if progress is not None:
            progress(len(together))
    texts = [answer_text(engine.tokenizer, one.tokens) for one in completions]
    said = [
        Answer(
            request.prompt,
            one.tokens,
            text,
            tuple(-entry.logprob for entry in one.logprobs),
            ended=one.finish == "stop",
            asked=prompt,
        )
        for prompt, request, one, text in zip(given, requests, completions, texts, strict=True)
    ]
    found = iter(said)
    parted = [tuple(next(found) for _ in asked) for asked in prompts]
    return parted if scorer is None else marked(engine, scorer, parted)


def marked(
    engine: Engine, scorer: AnswerScorer | Scorer, answers: Sequence[Sequence[Answer]]
) -> list[tuple[Answer, ...]]:
    """The answers with their scores, read together: what they share is then read once."""
    scores = iter(scored(engine, scorer, [one for each in answers for one in each]))
    return [tuple(replace(one, score=next(scores)) for one in each) for each in answers]


def scored(engine: Engine, scorer: AnswerScorer | Scorer, answers: Sequence[Answer]) -> list[Score]:
    """The score of each answer; the same text after the same prompt is judged once."""
    if not isinstance(scorer, AnswerScorer):
        return [scorer(answer.text) for answer in answers]
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for answer in answers:
        places.setdefault((answer.prompt, answer.tokens), len(places))
    once = list({(a.prompt, a.tokens): a for a in reversed(answers)}.values())
    once.sort(key=lambda a: places[a.prompt, a.tokens])
    found = scorer.score(
        engine, [a.prompt for a in once], [a.tokens for a in once], [a.text for a in once]
    )
    return [found[places[a.prompt, a.tokens]] for a in answers]


def measured(answers: Sequence[Answer], *, examples: int = 0) -> Measured:
    """The means over `answers`."""
    scores = [answer.score for answer in answers if answer.score.judged]
    judges_validity = bool(scores) and all(score.valid is not None for score in scores)
    return Measured(
        answers=len(answers),
        score=mean([score.value for score in scores]),
        loss=mean([loss for answer in answers for loss in answer.losses]),
        valid=mean([float(bool(score.valid)) for score in scores]) if judges_validity else None,
        both=mean([sound(score) for score in scores]) if judges_validity else None,
        unjudged=len(answers) - len(scores),
        examples=tuple(answer.text for answer in answers[:examples]),
    )


def sound(score: Score) -> float:
    """The score's value, 0 for a text that is not valid."""
    return score.value if score.valid else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
