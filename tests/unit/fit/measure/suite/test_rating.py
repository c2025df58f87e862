"""Three ratings and their harmonic mean, by the model itself and by a judge."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from steer.engines.base import CaptureRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.measure.answers import Answer, answers_under
from steer.fit.measure.scoring import Score
from steer.fit.measure.suite import judged
from steer.fit.measure.suite.file import SuiteConcept
from steer.fit.measure.suite.judged import JudgePanel, read_rating
from steer.fit.measure.suite.rating import ModelPanel, Rating, fluency, repeated_share

CONCEPT = SuiteConcept(name="e", description="the letter e", instruction="Say e.", score="words:e")


@pytest.mark.parametrize(
    ("three", "overall"),
    [((2, 2, 2), 2.0), ((1, 1, 2), 1.2), ((2, 2, 0), 0.0), ((0, 0, 0), 0.0), ((0.5, 2, 2), 1.0)],
)
def test_the_harmonic_mean_is_0_where_one_is(three: Any, overall: float) -> None:
    assert Rating(*three).overall == pytest.approx(overall)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0), ([1, 2, 3], 0), (range(20), 0), ([1] * 10, 0.9), ([1, 2, 3, 4] * 2, 0.5)],
)
def test_repeated_runs(tokens: Sequence[int], share: float) -> None:
    assert repeated_share(list(tokens)) == pytest.approx(share)


def test_fluency_falls_with_surprise_and_repetition() -> None:
    fresh = list(range(10))
    assert [fluency(x, fresh) for x in (-1.0, 1.0, 2.0, 3.0, 9.0)] == [2, 2, 1, 0, 0]
    assert fluency(0.0, [1, 2, 3, 4] * 2) == 1


def test_the_model_rates_what_it_would_say_itself(lively: TransformersEngine) -> None:
    prompts = ["one", "two words", "and three", "four"]
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    [plain] = answers_under(lively, [prompts], [None], lambda _: Score(0.0), sampling=sampling)
    tokens = [one.prompt for one in plain]
    panel = ModelPanel(lively, {"e": lambda text: Score(0.75)}, tokens, plain)
    own = panel.rate(CONCEPT, plain, range(4))
    assert [one.concept for one in own] == [1.5] * 4
    # Its own greedy answers: to their prompts, and as fluent as they repeat nothing.
    assert sum(one.instruction for one in own) / 4 > 1
    swapped = panel.rate(CONCEPT, [plain[1], plain[0]], [0, 1])
    assert sum(one.instruction for one in swapped) < sum(one.instruction for one in own[:2])
    noise = [Answer(tokens[0], tuple(range(60, 68)), "")]
    assert panel.rate(CONCEPT, noise, [0])[0].fluency < own[0].fluency
    nothing = [Answer(tokens[0], (), "")]
    assert panel.rate(CONCEPT, nothing, [0]) == [Rating(0, 0, 0)]


def test_the_same_answer_after_the_same_prompt_is_read_once(lively: TransformersEngine) -> None:
    read: list[int] = []

    def capture(request: CaptureRequest) -> Any:
        read.append(len(request.prompts))
        return lively.capture(request)

    engine: Any = SimpleNamespace(capture=capture)
    answer = Answer((1, 2), (3, 4), "")
    panel = ModelPanel(engine, {"e": lambda _: Score(1.0)}, [(1, 2), (5, 6)], [answer])
    before = sum(read)
    panel.rate(CONCEPT, [answer] * 5, [0] * 5)
    assert sum(read) - before == 2


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("It is there. Rating: [[2]]", 2),
        ("Rating: [[ 1 ]]", 1),
        ("Rating: [[0]] or rather Rating: [[1]]", 1),
        ("Rating: 2", 0),
        ("[[2]]", 0),
        ("Rating: [[3]]", 0),
        ("", 0),
    ],
)
def test_what_is_no_rating_counts_nothing(text: str, rating: float) -> None:
    assert read_rating(text) == rating


def test_a_judge_is_asked_three_questions_of_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(_self: Any, _client: Any, question: str) -> str:
        asked.append(question)
        return f"Rating: [[{2 if 'Concept:' in question else 1}]]"

    monkeypatch.setattr(JudgePanel, "_ask", ask)
    prompts: Any = ["What is tea?", [{"role": "user", "content": "And {coffee}?"}]]
    panel = JudgePanel("http://localhost:9/v1", "judge", prompts)
    answers = [Answer((1,), (2,), text) for text in ("A drink.", "A {drink}.", "A drink.")]
    found = panel.rate(CONCEPT, answers, [0, 1, 0])
    assert found == [Rating(2, 1, 1)] * 3
    assert len(asked) == 6  # the third answer is the first again
    assert sum("the letter e" in one for one in asked) == 2
    assert sum("And {coffee}?" in one for one in asked) == 1
    assert not any("{answer}" in one for one in asked)
    assert judged.read_rating("no") == 0
