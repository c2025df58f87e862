"""Labels in the words of a model that is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stub_model import StubModel, stub_model

from steer.errors import SteerError
from steer.fit.features.asked.outside import OutsideModel
from steer.fit.features.labeller import (
    Labeller,
    label_question,
    labelled_by,
    marked_excerpt,
    read_label,
)
from steer.registry.features.survey import FeatureExample, FeatureStatistics


def statistics(feature: int) -> FeatureStatistics:
    top = tuple(
        FeatureExample(
            value=9.0 - n, text=n, position=1, at=1, tokens=("in\n", f" city{feature}", f" {n}")
        )
        for n in range(3)
    )
    return FeatureStatistics(
        model="m",
        texts=10,
        tokens=100,
        fired=0 if feature == 2 else 3,
        rate=0.03,
        mean=1.0,
        largest=9.0,
        dead=feature == 2,
        dense=False,
        quantiles={},
        edges=(),
        histogram=(),
        top=top,
        sample=top[:1],
    )


class Surveyed:
    def feature(self, feature: int) -> FeatureStatistics:
        return statistics(feature)


@pytest.fixture
def model() -> Iterator[StubModel]:
    with stub_model() as one:
        yield one


def labeller(model: StubModel) -> Labeller:
    return Labeller(OutsideModel(model.url, "stub", "secret"), retries=0)


def test_every_feature_that_fired_is_asked_about_once(model: StubModel) -> None:
    model.reply = lambda question: "Names of city1." if "city1" in question else "other"
    found = labelled_by(labeller(model), Surveyed(), [0, 1, 2])  # type: ignore[arg-type]
    assert {n: one.text for n, one in found.items()} == {0: "other", 1: "Names of city1"}
    assert found[1].tokens == (" city1",)
    assert len(model.asked) == 2
    assert model.keys == {"Bearer secret"}


def test_the_question_marks_what_fires(model: StubModel) -> None:
    question = label_question(statistics(5))
    assert question.count("« city5»") == 3  # each example once
    assert "in⏎« city5» 0" in question
    example = statistics(5).top[0]
    assert marked_excerpt(example, marked=False) == "in⏎ city5 0"


def test_what_is_no_answer_is_asked_again_and_left_out(model: StubModel) -> None:
    model.reply = lambda question: "" if "city1" in question else "a label"
    found = labelled_by(labeller(model), Surveyed(), [0, 1])  # type: ignore[arg-type]
    assert set(found) == {0}
    assert sum("city1" in one for one in model.asked) == 3


@pytest.mark.parametrize("reply", ["", 500, 401])
def test_a_labeller_that_is_of_no_use_is_an_error(model: StubModel, reply: str | int) -> None:
    model.reply = lambda question: reply
    with pytest.raises(SteerError, match="the labeller") as raised:
        labelled_by(labeller(model), Surveyed(), [0, 1])  # type: ignore[arg-type]
    assert raised.value.code == "labeller_failed"
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Names of cities.", "Names of cities"),
        ('\n\n"Names of cities"\n', "Names of cities"),
        ("**Names of cities**\nbecause", "Names of cities"),
        ("Here it is:\n- Names of cities", "Names of cities"),
        ("", None),
        (" \n--- \n", None),
        ("x" * 500, "x" * 160),
    ],
)
def test_a_label_in_a_models_words(said: str, label: str | None) -> None:
    assert read_label(said) == label
