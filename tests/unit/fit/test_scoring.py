"""Scorers, by their spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.errors import SteerError
from steer.fit.scorers import parse_scorer
from steer.fit.scoring import Score


def test_regular_expressions_and_words(tmp_path: Path) -> None:
    assert parse_scorer(r"regex:^ja\b")("Ja, gerne").value == 1
    assert parse_scorer(r"regex:^ja\b")("Oh ja").value == 0
    words = parse_scorer("words:oui, très bien")
    assert [words(text).value for text in ("Oui!", "c'est TRÈS bien", "ouistiti")] == [1, 1, 0]
    (tmp_path / "words.txt").write_text("nein\n\nnie\n")
    assert parse_scorer(f"words:@{tmp_path / 'words.txt'}")("Nie wieder").value == 1


def test_a_function_of_ones_own() -> None:
    score = parse_scorer("python:steer_vectors.demo.recipe.scorers:french")
    assert score("Voici comment engager un professeur.") == Score(1.0, True)
    assert score("Here is how to hire a teacher.") == Score(0.0, True)
    assert score("Voici comment comment.").valid is False
    assert parse_scorer("python:operator:not_")("") == Score(1.0)


@pytest.mark.parametrize(
    "text",
    [
        "french",
        "regex:",
        "regex:(",
        "words:,",
        "words:@/nowhere",
        "python:nowhere:f",
        "python:math:nowhere",
        "python:math:pi",
        "python:math",
    ],
)
def test_what_is_no_scorer_is_refused(text: str) -> None:
    with pytest.raises(SteerError) as caught:
        parse_scorer(text)
    assert caught.value.code == "invalid_scorer"
