"""What is said of a vector and its nulls, on scores that are known."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from steer.artefacts.calibration import NullComparison
from steer.artefacts.control_vector import ControlVector
from steer.fit.measure.answers import Answer
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.nulls.comparison import (
    anti_steered,
    compare,
    p_value,
    q_values,
    told,
    wrong_way,
)
from steer.fit.measure.nulls.directions import NullVector
from steer.fit.measure.nulls.matching import Match
from steer.fit.measure.nulls.runs import Contender, ContenderRuns, NullRun
from steer.fit.measure.scoring import Score

DRAWS = Resamples.draw(8)
PLAIN = [0.0] * 6 + [1.0] * 2
STEERED = [1.0] * 7 + [0.0]


def answers(scores: list[float]) -> list[Answer]:
    return [
        Answer((1,), (2,), "", (), Score(0.0, judged=False) if math.isnan(one) else Score(one))
        for one in scores
    ]


def compared(*nulls: list[float], reached: bool = True) -> NullComparison:
    vector = ControlVector.of({0: torch.ones(2)})
    runs = tuple(
        NullRun(
            NullVector("isotropic", n, vector, {0: 0.25}, 0.25),
            Match(1.5, 0.2, 3, reached),
            answers(scores),
        )
        for n, scores in enumerate(nulls)
    )
    contender = Contender(cast("Any", None), 1.0, answers(STEERED), ())
    return compare(DRAWS, answers(PLAIN), contender, ContenderRuns(0.21, runs))


def test_a_vector_far_above_its_nulls() -> None:
    found = compared([0.0] * 8, [1.0] + [0.0] * 7, PLAIN)
    assert (found.score, found.unsteered, found.kl, found.strength) == (0.875, 0.25, 0.21, 1.0)
    assert [one.score for one in found.nulls] == [0, 0.125, 0.25]
    assert found.strongest == found.nulls[2]
    assert found.p_value == 0.25
    assert found.margin is not None
    assert found.margin.value == 0.625
    assert found.margin.low > 0
    assert found.above_null is True
    # The second null lost both prompts that the unsteered model had; PLAIN itself lost none.
    assert [one.anti_steered for one in found.nulls] == [0.25, 0.25, 0]
    assert told(found).startswith("it is above its nulls: at KL 0.21")


def test_a_null_that_does_as_much() -> None:
    found = compared([0.0] * 8, STEERED, reached=False)
    assert found.p_value == pytest.approx(2 / 3, rel=1e-5)
    assert found.above_null is False
    assert told(found).startswith("NOT above its nulls")
    assert told(found).endswith("2 of them did not reach that KL")


def test_a_weaker_null_that_varies_more_counts_too() -> None:
    """Over the strongest alone the interval is above 0; over the other it is not."""
    strongest = [0.68] * 7 + [-0.32]
    varying = [-1.0, -1.0, 2.0, 2.0, 2.0, -1.0, 2.0, -1.0]
    alone, both = compared(strongest), compared(strongest, varying)
    assert alone.above_null is True
    assert both.strongest == alone.strongest == both.nulls[0]
    assert both.margin == alone.margin
    assert both.p_value == pytest.approx(1 / 3, rel=1e-5)
    assert both.above_null is False


def test_a_margin_that_may_be_chance_is_not_above() -> None:
    """Two prompts more than the null, of eight: the interval reaches 0."""
    found = compared([1.0] * 5 + [0.0] * 3)
    assert found.p_value == 0.5
    assert found.margin is not None
    assert found.margin.value == 0.25
    assert found.margin.low <= 0
    assert found.above_null is False


def test_without_nulls_nothing_is_said() -> None:
    found = compared()
    assert (found.p_value, found.margin, found.above_null, found.strongest) == (None,) * 4


def test_what_was_not_judged_is_in_no_mean() -> None:
    found = compared([math.nan] * 8, [math.nan] * 4 + [1.0] * 4)
    assert [one.score for one in found.nulls] == [0, 1]
    assert found.above_null is False


@pytest.mark.parametrize(
    ("nulls", "wanted"),
    [([], 1.0), ([0.1, 0.2], 1 / 3), ([0.5, 0.2], 2 / 3), ([0.5, 0.6, 0.9], 1.0)],
)
def test_the_p_value_counts_ties_against_the_vector(nulls: list[float], wanted: float) -> None:
    assert p_value(0.5, nulls) == pytest.approx(wanted)


def test_the_wrong_way_is_down() -> None:
    before = [0.5, 0.5, 0.5, 0.5, math.nan, 0.5]
    after = [0.4, 0.5, 0.9, 0.5, 0.1, math.nan]
    found = wrong_way(Resamples.draw(6), before, after)
    assert found.value == 0.25
    assert found.low <= 0.25 <= found.high


def test_anti_steered_prompts_have_falling_lines() -> None:
    nan = math.nan
    scores = [
        # rises, falls, flat, up and down to no slope, falls with a gap, too few
        [0.0, 1.0, 0.3, 0.0, 0.9, nan],
        [0.5, 0.2, 0.3, 1.0, nan, 1.0],
        [1.0, 0.1, 0.3, 0.0, 0.8, nan],
    ]
    found = anti_steered(Resamples.draw(6), [0.0, 1.0, 2.0], scores)
    assert found.value == pytest.approx(2 / 5)


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    # By hand: sorted .01, .02, .03, .5 times 4 / rank, the least from there on.
    assert q_values([0.03, None, 0.01, 0.5, 0.02]) == [
        pytest.approx(0.04),
        None,
        pytest.approx(0.04),
        pytest.approx(0.5),
        pytest.approx(0.04),
    ]
    assert q_values([0.2]) == [pytest.approx(0.2)]
    assert q_values([None]) == [None]
    assert q_values([]) == []


def test_what_is_found_by_chance_is_within_the_rate() -> None:
    drawn = np.random.default_rng(0).uniform(size=(400, 20))
    false = [any(q is not None and q <= 0.1 for q in q_values(row.tolist())) for row in drawn]
    assert 0.06 < np.mean(false) < 0.14
