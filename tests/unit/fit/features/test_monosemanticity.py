"""FMS on planted latents: one that carries a concept alone, several copies of it, and noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from steer.fit.features.monosemanticity import BalancedHalves, monosemanticity

TEXTS, LATENTS, PLANTED = 800, 60, 7


def latents(positive: np.ndarray, copies: int, wrong: float = 0.015) -> sparse.csr_array:
    """Sparse noise, and `copies` of a latent that fires on positives but for a share `wrong`."""
    rng = np.random.default_rng(0)
    rows = rng.random((len(positive), LATENTS)) * (rng.random((len(positive), LATENTS)) < 0.1)
    told = positive ^ (rng.random(len(positive)) < wrong)
    for n in range(copies):
        rows[:, PLANTED + n] = told * (1 + rng.random(len(positive)))
    return sparse.csr_array(rows.astype(np.float32))


@pytest.mark.parametrize(
    ("copies", "wrong", "score", "within"),
    [(1, 0.015, 0.97, 0.03), (2, 0.0, 0.5, 0.01), (0, 0.0, 0.27, 0.05)],
)
def test_a_planted_latent_its_copies_and_noise(
    copies: int, wrong: float, score: float, within: float
) -> None:
    positive = np.arange(TEXTS) % 2 == 0
    found = monosemanticity(
        latents(positive, copies, wrong), positive, BalancedHalves.of(positive, 0)
    )
    assert found is not None
    assert found.fms == pytest.approx(score, abs=within)
    if copies:
        assert found.features[0] in range(PLANTED, PLANTED + copies)


def test_the_parts_of_a_score() -> None:
    positive = np.arange(TEXTS) % 2 == 0
    rows = latents(positive, 2, 0.0)
    once = monosemanticity(rows, positive, BalancedHalves.of(positive, 0), p=1)
    assert once is not None
    assert (once.capacity, once.local, once.widely) == (1.0, 0.0, 1.0)
    twice = monosemanticity(rows, positive, BalancedHalves.of(positive, 0), p=2)
    assert twice is not None
    assert set(twice.features[:2]) == {PLANTED, PLANTED + 1}
    assert twice.local == pytest.approx(1.0, abs=0.15)  # without both copies it is at chance


def test_classes_are_balanced_and_no_text_is_in_both_halves() -> None:
    positive = np.arange(100) < 20
    split = BalancedHalves.of(positive, 3)
    assert len(split.fitted) == len(split.held_out) == 20
    assert not set(split.fitted) & set(split.held_out)
    for half in (split.fitted, split.held_out):
        assert positive[half].sum() == 10


def test_latents_that_never_fire_tell_nothing() -> None:
    positive = np.arange(40) < 20
    rows = sparse.csr_array((40, 5), dtype=np.float32)
    assert monosemanticity(rows, positive, BalancedHalves.of(positive, 0)) is None
