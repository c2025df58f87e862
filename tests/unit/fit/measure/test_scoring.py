"""Scorers, by their spelling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.errors import SteerError
from steer.fit.measure.judge import JudgeScorer
from steer.fit.measure.probe import ProbeScorer
from steer.fit.measure.scorers import parse_scorer
from steer.fit.measure.scoring import AnswerScorer, Score, Scorer


def alone(text: str) -> Scorer:
    """A scorer that needs the text alone."""
    scorer = parse_scorer(text)
    assert not isinstance(scorer, AnswerScorer)
    return scorer


def test_regular_expressions_and_words(tmp_path: Path) -> None:
    assert alone(r"regex:^ja\b")("Ja, gerne").value == 1
    assert alone(r"regex:^ja\b")("Oh ja").value == 0
    words = alone("words:oui, très bien")
    assert [words(text).value for text in ("Oui!", "c'est TRÈS bien", "ouistiti")] == [1, 1, 0]
    (tmp_path / "words.txt").write_text("nein\n\nnie\n")
    assert alone(f"words:@{tmp_path / 'words.txt'}")("Nie wieder").value == 1


def test_a_function_of_ones_own() -> None:
    score = alone("python:steer_vectors.demo.recipe.scorers:french")
    assert score("Voici comment engager un professeur.") == Score(1.0, True)
    assert score("Here is how to hire a teacher.") == Score(0.0, True)
    assert score("Voici comment comment.").valid is False
    assert alone("python:operator:not_")("") == Score(1.0)


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
        "probe:v",
        "probe:",
        "judge:http://host/v1",
        "judge:http://host/v1#model=m",
        "judge:ftp://host/v1#model=m&question=q",
        "judge:http://host/v1#model=m&question=q&scale=1-5",
        "judge:http://host/v1#model=m&question=q&colour=red",
    ],
)
def test_what_is_no_scorer_is_refused(text: str) -> None:
    with pytest.raises(SteerError) as caught:
        parse_scorer(text)
    assert caught.value.code == "invalid_scorer"


def test_probes_and_judges() -> None:
    vector = ControlVector.of({2: torch.ones(4)}, name="v")
    probe = parse_scorer("probe:v#layer=2&threshold=1.5", {"v": vector}.__getitem__)
    assert probe == ProbeScorer(vector, 2, 1.5)
    judge = parse_scorer(
        "judge:http://127.0.0.1:9/v1#model=org/m&question=Is%20it%20French%3F&scale=0-10",
        judge_key="key",
    )
    assert judge == JudgeScorer(
        "http://127.0.0.1:9/v1", "org/m", "Is it French?", "0-10", api_key="key"
    )
    with pytest.raises(SteerError, match="are numbers"):
        parse_scorer("probe:v#layer=two", {"v": vector}.__getitem__)


@pytest.mark.parametrize("text", ["python:operator:not_", "words:@/etc/hostname", "judge:http://x"])
def test_a_server_can_leave_kinds_out(text: str) -> None:
    with pytest.raises(SteerError, match="not allowed here"):
        parse_scorer(text, kinds={"regex", "words", "probe"})
    assert parse_scorer("words:a", kinds={"words"})
