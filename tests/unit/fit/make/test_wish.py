"""How questions are parted, and the questions that ship."""

from __future__ import annotations

import pytest

from steer.errors import SteerError
from steer.fit.make.questions import neutral_questions
from steer.fit.make.wish import CHECKED, CHOSEN, FITTED, LEAST, RUN_OFF, QuestionParts

USED = FITTED + CHOSEN + CHECKED


@pytest.mark.parametrize("count", [LEAST, 40, USED, USED + 5, 160])
def test_no_question_is_in_two_parts(count: int) -> None:
    parts = QuestionParts.of([str(n) for n in range(count)], seed=3)

    every = [*parts.fitted, *parts.chosen, *parts.checked, *parts.run_off]
    assert len(set(map(str, every))) == len(every) <= USED + RUN_OFF
    assert len(every) >= min(count, USED + RUN_OFF) - 1
    others = len(every) - len(parts.run_off)
    assert len(parts.run_off) == min(count - others, RUN_OFF)
    assert min(len(parts.fitted), len(parts.chosen), len(parts.checked)) >= LEAST // 8


def test_the_seed_draws_the_parts() -> None:
    prompts = [str(n) for n in range(50)]

    assert (
        QuestionParts.of(prompts, 0) == QuestionParts.of(prompts, 0) != QuestionParts.of(prompts, 1)
    )


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(SteerError, match="23 prompts are too few") as caught:
        QuestionParts.of(["?"] * (LEAST - 1), 0)
    assert (caught.value.code, caught.value.param) == ("no_prompts", "/prompts")


def test_the_shipped_questions_are_many_and_different() -> None:
    questions = neutral_questions()

    assert len(questions) >= 128
    assert len(set(questions)) == len(questions)
    assert all(question.strip() == question != "" for question in questions)
    assert len({" ".join(question.split()[:2]) for question in questions}) > 25
