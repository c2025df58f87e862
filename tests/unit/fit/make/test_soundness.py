from __future__ import annotations

import math

import pytest

from steer.fit.make.soundness import Soundness, repetition


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 1, 2, 3], 0.25),
        ([7] * 10, 1 - 1 / 8),
    ],
)
def test_repetition_is_the_share_of_runs_said_before(tokens: list[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected)


def test_an_answer_is_sound_unless_it_repeats_itself_is_empty_or_unlikely() -> None:
    soundness = Soundness.of([1.0] * 19 + [9.0])

    assert soundness.max_loss == pytest.approx(9 + math.log(1.5))
    assert soundness.holds([1, 2, 3, 4], 9.0)
    assert not soundness.holds([1, 2, 3, 4], 9.5)
    assert not soundness.holds([7] * 10, 1.0)
    assert not soundness.holds([], 1.0)
