"""The verdicts of `make demo-eval`, on planted measurements."""

from __future__ import annotations

import math

import numpy as np
import pytest
from steer_vectors.demo.recipe.evaluation.checks import Check, count, table
from steer_vectors.demo.recipe.evaluation.estimates import (
    Estimate,
    difference,
    difference_of_ratios,
    share,
)


def test_a_share_of_all_is_still_uncertain() -> None:
    found = share([True] * 200)
    assert (found.value, found.high, found.n) == (1.0, 1.0, 200)
    assert found.low == pytest.approx(200 / (200 + 1.959964**2), abs=1e-4)


def test_an_interval_of_a_difference_narrows_with_the_root_of_its_number() -> None:
    draw = np.random.default_rng(1)
    few, many = (difference(draw.normal(1, 1, n).tolist(), [0.0] * n) for n in (100, 1600))
    assert many.high - many.low == pytest.approx(2 * 1.96 / math.sqrt(1600), rel=0.15)
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.25)
    assert many.low < 1 < many.high


def test_losses_are_weighed_by_tokens() -> None:
    found = difference_of_ratios([(2.0, 1), (2.0, 3)], [(1.0, 2), (1.0, 2)])
    assert found.value == pytest.approx(4 / 4 - 2 / 4)


@pytest.mark.parametrize(
    ("measured", "at_most", "met", "within"),
    [
        (Estimate(0.96, 0.93, 0.98, 240), False, True, True),
        (Estimate(0.94, 0.90, 0.97, 240), False, False, True),
        (Estimate(0.80, 0.74, 0.85, 240), False, False, False),
        (Estimate(0.96, 0.94, 0.98, 240), True, False, True),
        (Estimate(0.90, 0.85, 0.94, 240), True, True, True),
        (Estimate(0.99, 0.96, 1.00, 240), True, False, False),
    ],
)
def test_a_threshold_is_for_the_value_and_its_error_for_few_prompts(
    measured: Estimate, at_most: bool, met: bool, within: bool
) -> None:
    check = Check("group", "what", measured, 0.95, at_most=at_most)
    assert (check.met, check.within_error, check.fails) == (met, within, not met)


def test_a_part_fails_nothing_but_the_row_that_counts_it() -> None:
    part = Check("group", "part", Estimate(0.1, 0.0, 0.2, 9), 0.9, part=True)
    assert not part.met
    assert not part.fails
    assert count("group", "parts", [part.met, True], 2).fails
    assert "| part | 0.100 | 0.000 to 0.200 | 9 | ≥ 0.9 | no |" in table([part])


def test_a_fall_within_noise_is_none() -> None:
    before = [1.0] * 50 + [0.0] * 50
    same = difference([*before[1:], 0.0], before)
    fallen = difference([0.0] * 100, before)
    assert Check("group", "step", same, 0.0, noise=True).met
    assert not Check("group", "step", fallen, 0.0, noise=True).met
