"""Does the model do what it is told, and does an answer read as if it had been?

An answer is scored by its *gain*: how much likelier it is to the model that is told the instruction
than to the model that is told the opposite, the mean over its tokens of log p(a | told) −
log p(a | opposed), in nats. Between answers of the one and of the other no test of the same size
tells more apart (the lemma of Neyman and Pearson), and nothing has to be trained. Both readings are
unsteered, so what was edited is not what is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.engines.journal import remembered
from steer.errors import SteerError
from steer.fit.make.asking import Asked, Tokens
from steer.fit.make.soundness import Soundness
from steer.fit.measure.answers import Answer
from steer.fit.measure.scoring import AnswerScorer, Score, Scorer
from steer.readouts.measures import kl_divergence

MIN_OBEDIENCE = 0.7
"""How often an answer of the told model has to have the greater gain; .5 is chance."""

_BATCH = 256
_STEEPNESS = 1.5
_DEVIATIONS = 2.0


@dataclass(frozen=True)
class AnswerReading:
    """An answer read unsteered: the mean of log p of its tokens, in nats."""

    told: float
    opposed: float

    @property
    def gain(self) -> float:
        return self.told - self.opposed

    @property
    def loss(self) -> float:
        """−log p under whichever of the two finds it likelier."""
        return -max(self.told, self.opposed)


@dataclass(frozen=True)
class InstructionScorer:
    """Scores an answer by its gain beside those of unsteered answers, from 0 to 1: .5 is two
    standard deviations above their mean, and their mean .05. Every two deviations are three nats
    of odds.

    It knows the questions that `asked` holds, by each of their three forms. `valid` is what
    `soundness` says; an answer without tokens is not valid and scores 0.
    """

    asked: Mapping[Tokens, Asked]
    mean: float
    deviation: float
    soundness: Soundness

    def score(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        texts: Sequence[str],
    ) -> list[Score]:
        del texts
        asked = [self.asked[tuple(prompt)] for prompt in prompts]
        return [
            Score(0.0, valid=False) if read is None else self._score(read, tokens)
            for read, tokens in zip(readings(engine, asked, answers), answers, strict=True)
        ]

    def _score(self, read: AnswerReading, tokens: Sequence[int]) -> Score:
        deviations = (read.gain - self.mean) / self.deviation
        logit = _STEEPNESS * (deviations - _DEVIATIONS)
        value = 1 / (1 + math.exp(-max(-60.0, min(60.0, logit))))
        return Score(value, valid=self.soundness.holds(tokens, read.loss))


@dataclass(frozen=True)
class SoundScorer:
    """Another scorer's values, for answers that are sound to it (where it can tell) and to the
    instruction's own scorer, which knows what this model says."""

    values: AnswerScorer | Scorer
    reader: InstructionScorer

    def score(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        texts: Sequence[str],
    ) -> list[Score]:
        if isinstance(self.values, AnswerScorer):
            scores = self.values.score(engine, prompts, answers, texts)
        else:
            scores = [self.values(text) for text in texts]
        sound = self.reader.score(engine, prompts, answers, texts)
        return [
            replace(one, valid=one.valid is not False and other.valid)
            for one, other in zip(scores, sound, strict=True)
        ]


@dataclass(frozen=True)
class Obedience:
    """How the model follows an instruction in words: `area`, the chance that an answer of the model
    that is told it has a greater gain than one of the model that is told the opposite (.5: the
    words do nothing); and the scorer for more questions."""

    area: float
    scorer: InstructionScorer


def obedience(
    engine: Engine,
    asked: Sequence[Asked],
    plain: Sequence[Answer],
    told: Sequence[Answer],
    opposed: Sequence[Answer],
    *,
    known: Sequence[Asked],
) -> Obedience:
    """Reads the three models' answers to the questions `asked`, each unsteered; the scorer will
    know the questions `known`. Raises `SteerError` (`no_answers`) where fewer than two have tokens.
    """
    said = [one.tokens for side in (plain, told, opposed) for one in side]
    read = readings(engine, [*asked] * 3, said)
    sides = [read[n * len(asked) : (n + 1) * len(asked)] for n in range(3)]
    gains = [np.array([one.gain for one in side if one is not None]) for side in sides]
    if min(map(len, gains)) < 2:
        raise SteerError(
            "fewer than two of the model's answers to these prompts have any tokens, so there is "
            "nothing to read: give other prompts",
            code="no_answers",
            param="/prompts",
        )
    scorer = InstructionScorer(
        asked={form: one for one in known for form in (one.plain, one.told, one.opposed)},
        mean=float(gains[0].mean()),
        # Answers that are all the same would make any change look endless.
        deviation=max(float(gains[0].std(ddof=1)), 0.02),
        soundness=Soundness.of([one.loss for one in read if one is not None]),
    )
    return Obedience(_area(gains[1], gains[2]), scorer)


def said_kl(engine: Engine, asked: Sequence[Asked], plain: Sequence[Answer]) -> float:
    """How far the words move the model: the mean KL in nats of the told model's next-token
    distributions from the plain one's, along the plain answers."""
    what = ["said", [(one.told, answer.tokens) for one, answer in zip(asked, plain, strict=True)]]
    return float(remembered(engine, what, lambda: _moved(engine, asked, plain)))


def _moved(engine: Engine, asked: Sequence[Asked], plain: Sequence[Answer]) -> Tensor:
    found = []
    for one, answer in zip(asked, plain, strict=True):
        said = answer.tokens
        captured = engine.capture(CaptureRequest([one.told + said, one.plain + said], logits="all"))
        told, usual = (
            rows.logits[len(prompt) - 1 :]
            for rows, prompt in zip(captured, (one.told, one.plain), strict=True)
            if rows.logits is not None
        )
        found.append(kl_divergence(told, usual).mean())
    return torch.stack(found).mean()


def readings(
    engine: Engine, asked: Sequence[Asked], answers: Sequence[Sequence[int]]
) -> list[AnswerReading | None]:
    """Each answer read after both forms of its question; None for an answer without tokens."""
    pairs = [(one, tokens) for one, tokens in zip(asked, answers, strict=True) if len(tokens)]
    told = mean_logprobs(engine, [(one.told, tokens) for one, tokens in pairs])
    opposed = mean_logprobs(engine, [(one.opposed, tokens) for one, tokens in pairs])
    found = map(AnswerReading, told, opposed)
    return [next(found) if len(tokens) else None for tokens in answers]


def mean_logprobs(
    engine: Engine, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    """The mean log p, in nats, of what follows each prompt, which is not empty. What prompts and
    texts of one length share is read once."""
    found = [0.0] * len(rows)
    # Answers to one question come together, so that the engine reads what they share once.
    order = sorted(range(len(rows)), key=lambda n: (len(rows[n][1]), rows[n][0]))
    for length, alike in itertools.groupby(order, key=lambda n: len(rows[n][1])):
        same = list(alike)
        for first in range(0, len(same), _BATCH):
            group = same[first : first + _BATCH]
            texts = [[*rows[n][0], *rows[n][1]] for n in group]
            captured = engine.capture(CaptureRequest(texts, logprobs=0, tail=length))
            for n, one in zip(group, captured, strict=True):
                found[n] = sum(token.logprob for token in one.logprobs) / length
    return found


def _area(higher: np.ndarray, lower: np.ndarray) -> float:
    """The area under the ROC curve."""
    above = higher[:, None] > lower[None]
    same = higher[:, None] == lower[None]
    return float((above + same / 2).mean())
