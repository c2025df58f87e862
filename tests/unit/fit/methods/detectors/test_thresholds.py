"""Thresholds: what a conformal one promises holds exactly, ties included."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.fit.methods.detectors.roc import auroc, auroc_interval, roc_points, share_above
from steer.fit.methods.detectors.thresholds import conformal_threshold, quantile_threshold

RATES = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9])
# Few distinct values, so that most scores are tied with others.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=60)


@given(scores=SCORES, rate=RATES)
def test_of_exchangeable_texts_no_more_than_the_rate_are_above(
    scores: list[float], rate: float
) -> None:
    """Each of n + 1 texts is in turn the new one, as likely as any other: the share of them that is
    above the threshold of the rest is the chance of a false alarm, and at most the rate."""
    alarms = 0
    for place, score in enumerate(scores):
        rest = scores[:place] + scores[place + 1 :]
        try:
            alarms += score > conformal_threshold(rest, rate)
        except SteerError:
            return  # too few for any promise
    assert Fraction(alarms, len(scores)) <= Fraction(str(rate))


@pytest.mark.parametrize(("rate", "least"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 3), (0.5, 1)])
def test_how_many_safe_texts_it_takes(rate: float, least: int) -> None:
    scores = [float(n) for n in range(least)]
    assert conformal_threshold(scores, rate) == least - 1
    with pytest.raises(SteerError) as raised:
        conformal_threshold(scores[:-1], rate)
    assert raised.value.code == "too_few_safe_texts"
    assert f"at least {least} " in raised.value.message


def test_a_false_rate_measured_on_many_texts() -> None:
    """The promise is of the mean over calibrations: drawn often enough, it shows."""
    rng = np.random.default_rng(5)
    alarms = []
    for _ in range(400):
        threshold = conformal_threshold(np.round(rng.normal(size=39), 1).tolist(), 0.1)
        alarms.append(share_above(np.round(rng.normal(size=500), 1).tolist(), threshold))
    error = np.std(alarms) / math.sqrt(len(alarms))
    assert np.mean(alarms) <= 0.1 + 3 * error
    assert np.mean(alarms) > 0.05


@given(scores=SCORES, rate=RATES)
def test_the_empirical_threshold_is_the_smallest_that_keeps_the_rate(
    scores: list[float], rate: float
) -> None:
    threshold = quantile_threshold(scores, rate)
    assert share_above(scores, threshold) <= rate
    lower = [score for score in scores if score < threshold]
    if lower:
        assert share_above(scores, max(lower)) > rate
    with pytest.raises(SteerError):
        quantile_threshold([], rate)


@given(
    positive=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12),
    negative=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12),
)
def test_the_area_is_the_share_of_pairs_won(positive: list[float], negative: list[float]) -> None:
    won = sum((a > b) + 0.5 * (a == b) for a in positive for b in negative)
    expected = won / (len(positive) * len(negative))
    assert float(auroc(np.array(positive), np.array(negative))) == pytest.approx(expected)
    points = roc_points(positive, negative)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert area == pytest.approx(expected)
    assert points[-1] == (1.0, 1.0)
    assert list(points) == sorted(points)


def test_an_interval_of_the_area() -> None:
    found = auroc_interval([1.0, 2.0, 3.0, 0.0], [0.5, -1.0, 1.5, 0.0], seed=1)
    assert found.low <= found.value <= found.high
    assert auroc_interval([2.0, 3.0], [0.0, 1.0]).model_dump() == dict.fromkeys(
        ("value", "low", "high"), 1.0
    )
