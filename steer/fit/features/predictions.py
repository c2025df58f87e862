"""Does a label say when its feature fires? Detection and fuzzing (2410.13928), and its tokens.

- *Detection*: a labeller is told the label and shown excerpts, of which half made the feature fire.
- *Fuzzing*: each excerpt has a marked token; in half of them it is one that fires.
- *Tokens*: without any model, the tokens that a label names predict that the feature fires there.

What is shown beside the survey's examples is read through the model again, so that where a feature
is said not to fire it does not.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.base import CaptureRequest, Engine
from steer.fit.features.exemplars import SPAN, distinct_examples
from steer.fit.features.labeller import CLOSE, OPEN, Labeller, marked_excerpt
from steer.model import HookPoint
from steer.registry.features.scores import PredictionScore
from steer.registry.features.survey import FeatureExample, Survey

TEXTS = 64
"""Texts that are read again."""
SHOWN = 10
"""Excerpts in one question; half of them are right."""
QUESTIONS = 2
"""Questions of each kind about a feature."""
_BATCH = 16
_SILENT = 50
"""How often a place where a feature does not fire is looked for."""


@dataclass(frozen=True)
class ReadAgain:
    """Some of a survey's texts with the activations of a few features: `fires[n]` is
    `[tokens, features]` of the text `numbers[n]`."""

    survey: Survey
    features: tuple[int, ...]
    numbers: tuple[int, ...]
    fires: tuple[NDArray[np.float32], ...]

    def column(self, feature: int) -> int:
        return self.features.index(feature)


def read_again(
    engine: Engine, sae: SAE, survey: Survey, features: Sequence[int], *, seed: int = 0
) -> ReadAgain:
    """Reads up to `TEXTS` of the survey's texts, drawn with `seed`. Raises `SteerError`."""
    count = min(TEXTS, survey.card.texts)
    numbers = sorted(random.Random(seed).sample(range(survey.card.texts), count))
    point = HookPoint(sae.layer, sae.site)
    fires = []
    for first in range(0, count, _BATCH):
        texts = [survey.text(number) for number in numbers[first : first + _BATCH]]
        for one in engine.capture(CaptureRequest(texts, (point,))):
            kept = sae.encode(one.states[point])[:, list(features)]
            kept[0] = torch.where(kept[0] > 0, torch.nan, kept[0])  # beginnings do not count
            fires.append(kept.numpy())
    return ReadAgain(survey, tuple(features), tuple(numbers), tuple(fires))


def token_score(again: ReadAgain, feature: int, label: FeatureLabel) -> PredictionScore | None:
    """What the tokens that the label names predict, on texts that are none of the feature's
    examples; None where it names none, or no text is left on which it fires."""
    survey, column = again.survey, again.column(feature)
    seen = {one.text for one in distinct_examples(survey.feature(feature))}
    named = set(label.tokens)
    predicted, fired = [], []
    for number, fires in zip(again.numbers, again.fires, strict=True):
        if number not in seen:
            texts = [survey.card.vocabulary[token] for token in survey.text(number)]
            known = ~np.isnan(fires[:, column])
            predicted += np.array([one in named for one in texts])[known].tolist()
            fired += (fires[known, column] > 0).tolist()
    if not named or not any(fired):
        return None
    return prediction_score(predicted, fired)


def prediction_score(predicted: Sequence[bool], fired: Sequence[bool]) -> PredictionScore:
    """Precision, recall and balanced accuracy of predictions."""
    guess, truth = np.array(predicted, bool), np.array(fired, bool)
    right = int((guess & truth).sum())
    recall = right / max(int(truth.sum()), 1)
    silent = int((~guess & ~truth).sum()) / max(int((~truth).sum()), 1)
    return PredictionScore(
        asked=len(truth),
        precision=right / max(int(guess.sum()), 1),
        recall=recall,
        balanced=(recall + silent) / 2,
    )


@dataclass(frozen=True)
class Quiz:
    """One question to a labeller: the excerpts as they are shown, and which of them are right."""

    question: str
    right: tuple[bool, ...]


def asked_scores(
    labeller: Labeller, again: ReadAgain, labels: Mapping[int, FeatureLabel], *, seed: int = 0
) -> dict[int, tuple[PredictionScore | None, PredictionScore | None]]:
    """By feature, detection and fuzzing; None where there are too few excerpts, or the labeller's
    answers cannot be read. Raises `SteerError` (`labeller_failed`)."""
    quizzes: list[tuple[int, int, Quiz]] = []
    for feature, label in labels.items():
        draw = random.Random(f"{seed} {feature}")
        for kind, make in enumerate((_detection, _fuzzing)):
            quizzes += [(feature, kind, one) for one in make(again, feature, label.text, draw)]
    answers = labeller.ask(
        [quiz.question for *_, quiz in quizzes],
        lambda place, said: read_numbers(said, len(quizzes[place][2].right)),
    )
    found: dict[tuple[int, int], tuple[list[bool], list[bool]]] = {}
    for (feature, kind, quiz), chosen in zip(quizzes, answers, strict=True):
        if chosen is not None:
            predicted, fired = found.setdefault((feature, kind), ([], []))
            predicted += [place + 1 in chosen for place in range(len(quiz.right))]
            fired += quiz.right
    return {
        feature: (_scored(found.get((feature, 0))), _scored(found.get((feature, 1))))
        for feature in labels
    }


def read_numbers(said: str, most: int) -> frozenset[int] | None:
    """The numbers that a labeller chose, up to `most`; empty for "none", None for no answer."""
    words = said.strip()
    if re.fullmatch(r"\W*none\W*", words, re.IGNORECASE):
        return frozenset()
    if re.fullmatch(r"[\s\d,;.&\[\]()]*(?:and[\s\d]+)?\.?", words) is None:
        return None
    numbers = frozenset(map(int, re.findall(r"\d+", words)))
    return numbers if numbers and all(1 <= one <= most for one in numbers) else None


def _scored(found: tuple[list[bool], list[bool]] | None) -> PredictionScore | None:
    return None if found is None else prediction_score(*found)


def _detection(again: ReadAgain, feature: int, text: str, draw: random.Random) -> list[Quiz]:
    shows = _examples(again, feature, draw)
    hides = [_silent_excerpt(again, feature, draw) for _ in shows]
    told = (
        f"A unit of a language model is said to respond to: {text}\n\nIn which of these excerpts "
        "would it respond?"
    )
    return _quizzes(told, [marked_excerpt(one, marked=False) for one in shows], hides, draw)


def _fuzzing(again: ReadAgain, feature: int, text: str, draw: random.Random) -> list[Quiz]:
    shows = _examples(again, feature, draw)
    hides = [_silent_excerpt(again, feature, draw, marked=True) for _ in shows]
    told = (
        f"A unit of a language model is said to respond to: {text}\n\nIn which of these excerpts "
        f"is the token between {OPEN} and {CLOSE} one that it would respond to?"
    )
    return _quizzes(told, [marked_excerpt(one) for one in shows], hides, draw)


def _examples(again: ReadAgain, feature: int, draw: random.Random) -> list[FeatureExample]:
    """Examples that are spread over the feature's range, in any order."""
    found = distinct_examples(again.survey.feature(feature, context=SPAN))
    draw.shuffle(found)
    return found[: QUESTIONS * SHOWN // 2]


def _quizzes(
    told: str,
    shows: Sequence[str],
    hides: Sequence[str | None],
    draw: random.Random,
) -> list[Quiz]:
    pairs = [(show, hide) for show, hide in zip(shows, hides, strict=True) if hide is not None]
    made = []
    for first in range(0, len(pairs), SHOWN // 2):
        group = pairs[first : first + SHOWN // 2]
        lines = [(one, True) for one, _ in group] + [(one, False) for _, one in group]
        draw.shuffle(lines)
        listed = "\n".join(f"{n}. {line}" for n, (line, _) in enumerate(lines, start=1))
        made.append(
            Quiz(
                f"{told}\n\n{listed}\n\nAnswer with their numbers alone, such as 2, 5; or with "
                "the word none.",
                tuple(right for _, right in lines),
            )
        )
    return made


def _silent_excerpt(
    again: ReadAgain, feature: int, draw: random.Random, *, marked: bool = False
) -> str | None:
    """An excerpt of a text in which the feature does not fire at all; or, `marked`, at a token at
    which it does not. None where none was found."""
    column, survey = again.column(feature), again.survey
    for _ in range(_SILENT):
        place = draw.randrange(len(again.numbers))
        fires = again.fires[place][:, column]
        at = draw.randrange(len(fires))
        first, last = max(0, at - SPAN), at + SPAN + 1
        near = fires[at : at + 1] if marked else fires[first:last]
        if bool((near == 0).all()):
            ids = survey.text(again.numbers[place])[first:last]
            tokens = tuple(survey.card.vocabulary[token] for token in ids)
            example = FeatureExample(value=0, text=0, position=at, at=at - first, tokens=tokens)
            return marked_excerpt(example, marked=marked)
    return None
