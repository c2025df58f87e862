"""Ratings in the manner of AxBench (2501.17148): concept, instruction and fluency, each 0 to 2.

A panel rates answers. `ModelPanel` needs no judge: the served model itself, unsteered, says how
likely it finds an answer, after its own prompt and after others. That is a stand-in: it knows
whether an answer belongs to its question and whether it reads like the model's own words, not
whether it is true or helpful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from steer.engines.base import CaptureRequest, Engine
from steer.fit.measure.answers import Answer, mean, scored
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.fit.measure.suite.file import SuiteConcept

BEST = 2.0
OTHERS = 3
"""Other prompts that an answer is read after."""

FLUENT, BROKEN = 1.0, 3.0
"""Nats per token above the unsteered answers' own: up to the first an answer counts as fluent, from
the second on as broken."""

GRAM = 4
_BATCH = 32


@dataclass(frozen=True)
class Rating:
    """An answer's three ratings, 0 to 2."""

    concept: float
    instruction: float
    fluency: float

    @property
    def overall(self) -> float:
        """The harmonic mean, 0 if any of the three is."""
        three = (self.concept, self.instruction, self.fluency)
        return 0.0 if min(three) <= 0 else len(three) / sum(1 / one for one in three)


class Panel(Protocol):
    """Rates answers; answer n is to prompt `places[n]`."""

    @property
    def identity(self) -> str:
        """What tells panels apart, for results that are kept."""

    def rate(
        self, concept: SuiteConcept, answers: Sequence[Answer], places: Sequence[int]
    ) -> list[Rating]: ...


class ModelPanel:
    """Rates by a concept's own scorer and by what the unsteered model makes of an answer.

    - concept: twice the scorer's value;
    - instruction: twice the share of `OTHERS` other prompts after which the model finds the answer
      less likely than after its own;
    - fluency: 2 up to `FLUENT` nats per token above the model's unsteered answers, 0 from `BROKEN`
      on, straight between, times the share of tokens outside of repeated runs of `GRAM`.

    `prompts` and `plain` are the suite's prompts as tokens and the unsteered answers to them.
    """

    def __init__(
        self,
        engine: Engine,
        scorers: dict[str, Scorer | AnswerScorer],
        prompts: Sequence[Sequence[int]],
        plain: Sequence[Answer],
    ) -> None:
        self._engine, self._scorers, self._prompts = engine, scorers, prompts
        self.identity = "model"
        self._own = mean(
            [
                loss
                for answer, loss in zip(plain, self._losses(list(enumerate(plain))), strict=True)
                if answer.tokens
            ]
        )

    def rate(
        self, concept: SuiteConcept, answers: Sequence[Answer], places: Sequence[int]
    ) -> list[Rating]:
        scores = scored(self._engine, self._scorers[concept.name], answers)
        count = len(self._prompts)
        others = min(OTHERS, count - 1)
        read = [
            ((place + step) % count, answer)
            for answer, place in zip(answers, places, strict=True)
            for step in range(1 + others)
        ]
        losses = self._losses(read)
        found = []
        for n, (answer, score) in enumerate(zip(answers, scores, strict=True)):
            own, *elsewhere = losses[n * (1 + others) : (n + 1) * (1 + others)]
            if not answer.tokens:
                found.append(Rating(0.0, 0.0, 0.0))
                continue
            found.append(
                Rating(
                    concept=BEST * (score.value if score.judged else 0.0),
                    instruction=BEST * mean([float(one > own) for one in elsewhere]),
                    fluency=fluency(own - self._own, answer.tokens),
                )
            )
        return found

    def _losses(self, read: Sequence[tuple[int, Answer]]) -> list[float]:
        """The mean −log p of each answer's tokens after the prompt at its place, unsteered."""
        once = list(dict.fromkeys((place, answer.tokens) for place, answer in read))
        found: dict[tuple[int, tuple[int, ...]], float] = {}
        for first in range(0, len(once), _BATCH):
            group = once[first : first + _BATCH]
            texts = [[*self._prompts[place], *tokens] for place, tokens in group]
            captured = self._engine.capture(CaptureRequest(texts, logprobs=0))
            for (place, tokens), one in zip(group, captured, strict=True):
                kept = one.logprobs[-len(tokens) :] if tokens else ()
                found[place, tokens] = mean([-entry.logprob for entry in kept])
        return [found[place, answer.tokens] for place, answer in read]


def fluency(excess: float, tokens: Sequence[int]) -> float:
    """0 to 2, from the nats per token above the unsteered answers' own and from repetition."""
    likely = min(max((BROKEN - excess) / (BROKEN - FLUENT), 0.0), 1.0)
    return BEST * likely * (1 - repeated_share(tokens))


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of tokens that lie in a run of `GRAM` tokens which stood there before."""
    seen: set[tuple[int, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(tokens) - GRAM + 1):
        run = tuple(tokens[start : start + GRAM])
        if run in seen:
            repeated.update(range(start, start + GRAM))
        seen.add(run)
    return len(repeated) / len(tokens) if tokens else 0.0
