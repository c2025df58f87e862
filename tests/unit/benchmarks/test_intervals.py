"""Medians over starts and rounds, and how sure they are."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.intervals import of_rounds, of_starts, verdict


def test_the_figure_is_the_median_of_the_starts_medians() -> None:
    starts = [[1.0, 1.1, 9.0], [2.0, 2.0, 2.1], [0.5, 3.0, 3.1]]
    assert of_starts(starts).value == 2.0
    assert of_rounds([3.0, 1.0, 2.0]).value == 2.0


def test_rounds_of_one_start_are_no_independent_witnesses() -> None:
    """Starts that differ by 2 % leave an interval of 2 %, however many rounds each has."""
    generator = np.random.default_rng(0)
    offsets = [-0.02, -0.01, 0.0, 0.01, 0.02]
    starts = [(1 + one + 0.001 * generator.standard_normal(200)).tolist() for one in offsets]
    nested = of_starts(starts)
    pooled = of_rounds([each for one in starts for each in one])
    assert nested.low < 0.985
    assert nested.high > 1.015
    assert pooled.high - pooled.low < 0.5 * (nested.high - nested.low)


def test_it_is_the_same_each_time_and_narrows_with_more_starts() -> None:
    generator = np.random.default_rng(1)
    starts = (1 + 0.02 * generator.standard_normal((40, 5))).tolist()
    assert of_starts(starts) == of_starts(starts)
    few, many = of_starts(starts[:5]), of_starts(starts)
    assert many.high - many.low < few.high - few.low


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of experiments with five starts some 19 of 20 hold the true median; 17 is what chance leaves
    of so few experiments."""
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(60):
        offsets = 0.02 * generator.standard_normal((5, 1))
        found = of_starts((1 + offsets + 0.005 * generator.standard_normal((5, 4))).tolist())
        held += found.low <= 1.0 <= found.high
    assert held >= 51


@pytest.mark.parametrize(
    ("starts", "aim", "at_least", "said"),
    [
        ([[1.0, 1.001], [1.002, 1.0]], 1.005, False, "met"),
        ([[1.02, 1.03], [1.02, 1.04]], 1.005, False, "not met"),
        ([[0.99, 1.0], [1.02, 1.03]], 1.005, False, "undecided"),
        ([[1.0, 1.01], [1.02, 1.0]], 0.99, True, "met"),
        ([[0.9, 0.91], [0.92, 0.9]], 0.99, True, "not met"),
        ([[0.9, 1.1], [0.92, 1.2]], 0.99, True, "undecided"),
        ([[1.0], [1.0]], 1.005, False, "too few rounds"),
        ([[1.0], [1.0]], None, False, ""),
    ],
)
def test_what_is_said_of_an_aim(
    starts: list[list[float]], aim: float | None, at_least: bool, said: str
) -> None:
    assert verdict(starts, aim, at_least=at_least) == said


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        of_starts([[], []])
