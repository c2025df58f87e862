"""What a label predicts, against what its feature does: by its tokens, and by a labeller."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stub_model import StubModel, stub_model

from steer.artefacts.sae.labels import FeatureLabel
from steer.fit.features.asked.outside import OutsideModel
from steer.fit.features.labeller import Labeller
from steer.fit.features.predictions import (
    ReadAgain,
    asked_scores,
    prediction_score,
    read_numbers,
    token_score,
)
from steer.registry.features.survey import FeatureExample

VOCABULARY = dict(enumerate((" a", " b", " c", " x", " y")))
X = 3
TEXTS = [
    [draw.randrange(5) if n % 2 else draw.randrange(3) for _ in range(30)]
    for draw in [random.Random(4)]
    for n in range(24)
]
"""Half of them have the token that the feature fires on."""


class Surveyed:
    """A survey of `TEXTS`, whose feature 0 fires on `X` alone."""

    card = SimpleNamespace(vocabulary=VOCABULARY, texts=len(TEXTS))

    def text(self, number: int) -> list[int]:
        return TEXTS[number]

    def feature(self, feature: int, *, context: int = 10) -> Any:
        del feature
        found = [
            FeatureExample(
                value=1.0,
                text=number,
                position=place,
                at=min(place, context),
                tokens=tuple(
                    VOCABULARY[t] for t in text[max(0, place - context) : place + context + 1]
                ),
            )
            for number, text in enumerate(TEXTS[:8])
            for place, token in enumerate(text)
            if token == X
        ]
        return SimpleNamespace(top=tuple(found[:10]), sample=tuple(found[10:22]))


AGAIN = ReadAgain(
    Surveyed(),  # type: ignore[arg-type]
    (0,),
    tuple(range(len(TEXTS))),
    tuple(np.array([[float(token == X)] for token in text], np.float32) for text in TEXTS),
)


@pytest.fixture
def model() -> Iterator[StubModel]:
    with stub_model() as one:
        yield one


def chosen(question: str, pattern: str) -> str:
    """What a labeller says who chooses the excerpts with the pattern."""
    lines = re.findall(r"^(\d+)\. (.*)$", question, re.MULTILINE)
    return ", ".join(number for number, line in lines if re.search(pattern, line)) or "none"


def knowing(question: str) -> str:
    return chosen(question, "« x»" if "«" in question else " x")


def test_who_knows_the_feature_predicts_all_of_it(model: StubModel) -> None:
    model.reply = knowing
    labels = {0: FeatureLabel(text="the letter x")}
    found = asked_scores(Labeller(OutsideModel(model.url, "stub"), retries=0), AGAIN, labels)
    for score in found[0]:
        assert score is not None
        assert (score.precision, score.recall, score.balanced) == (1, 1, 1)
        assert score.asked == 20
    assert all("the letter x" in question for question in model.asked)


def test_a_wrong_label_predicts_nothing(model: StubModel) -> None:
    model.reply = lambda question: "None."
    found = asked_scores(
        Labeller(OutsideModel(model.url, "stub"), retries=0),
        AGAIN,
        {0: FeatureLabel(text="the letter q")},
    )
    for score in found[0]:
        assert score is not None
        assert (score.precision, score.recall, score.balanced) == (0, 0, 0.5)


def test_what_fires_is_not_given_away(model: StubModel) -> None:
    """Detection shows no marks, and fuzzing one in every excerpt; half of the lines are right."""
    model.reply = knowing
    asked_scores(
        Labeller(OutsideModel(model.url, "stub"), retries=0),
        AGAIN,
        {0: FeatureLabel(text="the letter x")},
    )
    fuzzing = [one for one in model.asked if "between" in one]
    detection = [one for one in model.asked if "between" not in one]
    assert len(fuzzing) == len(detection) == 2
    for question in detection:
        assert "«" not in question
    for question in fuzzing:
        lines = re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)
        assert [line.count("«") for line in lines] == [1] * 10
        assert sum("« x»" in line for line in lines) == 5


@pytest.mark.parametrize(
    ("tokens", "precision", "recall"),
    [((" x",), 1.0, 1.0), ((" x", " y"), None, 1.0), ((" a",), 0.0, 0.0)],
)
def test_the_tokens_of_a_label_predict_too(
    tokens: tuple[str, ...], precision: float | None, recall: float
) -> None:
    found = token_score(AGAIN, 0, FeatureLabel(text="letters", tokens=tokens))
    assert found is not None
    assert found.recall == recall
    if precision is None:
        fresh = [token for text in TEXTS[8:] for token in text]
        precision = fresh.count(X) / (fresh.count(X) + fresh.count(X + 1))
    assert found.precision == pytest.approx(precision)


def test_a_label_without_tokens_predicts_none() -> None:
    assert token_score(AGAIN, 0, FeatureLabel(text="letters")) is None


def test_scores_of_predictions() -> None:
    found = prediction_score([True, True, False, False], [True, False, True, False])
    assert (found.precision, found.recall, found.balanced) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("said", "numbers"),
    [
        ("2, 5", {2, 5}),
        ("[1, 3]", {1, 3}),
        ("7", {7}),
        ("1, 2 and 3.", {1, 2, 3}),
        ("None.", set()),
        ("", None),
        ("11", None),
        ("0", None),
        ("I would say 2", None),
        ("none of 3", None),
    ],
)
def test_numbers_in_a_labellers_words(said: str, numbers: set[int] | None) -> None:
    assert read_numbers(said, 10) == numbers
