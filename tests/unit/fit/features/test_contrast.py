"""Features that tell two sets apart: planted ones are found, and chance is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from steer.errors import SteerError
from steer.fit.features.contrast import auroc_interval, contrast

FEATURES = 3000


def noise(seed: int, texts: int = 30) -> np.ndarray:
    """Activations of which half are above 0."""
    drawn = np.random.default_rng(seed).normal(size=(texts, FEATURES))
    return np.maximum(drawn, 0.0)


def test_planted_features_are_found_and_confirmed_in_both_directions() -> None:
    positive, negative = noise(1), noise(2)
    positive[:, 17] += 2.0
    negative[:, 99] += 2.0
    found = contrast(sparse.csr_array(positive), sparse.csr_array(negative), top=4)
    first, second, *others = found.features
    assert {(first.feature, first.fires_on), (second.feature, second.fires_on)} == {
        (17, "positive"),
        (99, "negative"),
    }
    assert first.confirmed
    assert second.confirmed
    assert first.p == 0.001
    assert not any(one.confirmed for one in others)
    # The means are over all texts.
    assert first.mean_positive == pytest.approx(positive[:, first.feature].mean())
    assert first.mean_negative == pytest.approx(negative[:, first.feature].mean())


def test_among_thousands_of_features_chance_finds_none() -> None:
    """Of 40 contrasts without a difference, no more than a few have any p below 0.05."""
    found = [
        contrast(
            sparse.csr_array(noise(2 * seed)),
            sparse.csr_array(noise(2 * seed + 1)),
            permutations=99,
            seed=seed,
        )
        for seed in range(40)
    ]
    assert sum(any(one.p <= 0.05 for one in each.features) for each in found) <= 5
    assert sum(any(one.confirmed for one in each.features) for each in found) <= 1
    # Not because nothing looks good: the best would pass for a finding by itself.
    assert min(max(abs(one.auroc - 0.5) for one in each.features) for each in found) > 0.2


def test_auroc_is_the_textbooks_with_ties() -> None:
    rng = np.random.default_rng(5)
    positive = rng.integers(0, 3, (9, 5)).astype(float)
    negative = rng.integers(0, 2, (8, 5)).astype(float)
    found = contrast(sparse.csr_array(positive), sparse.csr_array(negative), permutations=99)
    again = np.random.default_rng(0)
    first, second = again.permutation(9), again.permutation(8)
    for one in found.features:
        for value, p, n in (
            (one.auroc, first[:5], second[:4]),
            (one.held_out, first[5:], second[4:]),
        ):
            scores = [*positive[p, one.feature], *negative[n, one.feature]]
            truth = [1] * len(p) + [0] * len(n)
            assert value == pytest.approx(roc_auc_score(truth, scores))


def test_features_that_never_fire_are_not_tested() -> None:
    silent = np.zeros((8, 4))
    found = contrast(sparse.csr_array(silent), sparse.csr_array(silent))
    assert (found.tested, found.features) == (0, ())


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_too_few_texts_are_refused_at_their_field(side: str) -> None:
    sets = {
        name: sparse.csr_array(noise(0, 7 if name == side else 8))
        for name in ("positive", "negative")
    }
    with pytest.raises(SteerError) as raised:
        contrast(**sets)
    assert (raised.value.code, raised.value.param) == ("too_few_texts", f"/{side}")


def test_the_interval_covers_and_does_not_collapse() -> None:
    low, high = auroc_interval(1.0, 20, 20)
    assert low == pytest.approx(0.8987, abs=1e-4)
    assert high == 1.0
    assert auroc_interval(0.0, 20, 20) == pytest.approx((1 - high, 1 - low))
    rng = np.random.default_rng(3)
    truth = norm.cdf(1 / np.sqrt(2))
    covered = 0
    for _ in range(400):
        a, b = rng.normal(1, 1, 15), rng.normal(0, 1, 15)
        low, high = auroc_interval((a[:, None] > b).mean(), 15, 15)
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.99
