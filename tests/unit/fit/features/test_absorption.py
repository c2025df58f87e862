"""Absorption on a planted dictionary: a parent, and children that carry it along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import sparse

from steer.fit.features.absorption import Probe, absorption, standing_for
from steer.fit.features.monosemanticity import BalancedHalves

WIDTH, OTHERS = 32, 20
PARENT, CHILDREN = 0, (1, 2, 3)
TEXTS = 2000


class Planted:
    """Tokens that have the parent concept or not; of those that have it, a few have a child too.
    A child's latent writes the parent's direction with its own, and the parent is then silent."""

    def __init__(self, *, absorbed: bool) -> None:
        rng = np.random.default_rng(1)
        basis = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
        self.rows = np.concatenate([basis[:1], basis[1:4], basis[4 : 4 + OTHERS]])
        if absorbed:
            self.rows[list(CHILDREN)] += self.rows[PARENT]
        self.positive = np.arange(TEXTS) % 2 == 0
        self.child = np.where(
            self.positive & (rng.random(TEXTS) < 0.06), rng.integers(1, 4, TEXTS), 0
        )
        latents = np.zeros((TEXTS, 1 + len(CHILDREN) + OTHERS))
        latents[:, PARENT] = 4.0 * (self.positive & ~(absorbed & (self.child > 0)))
        for one in CHILDREN:
            latents[:, one] = 4.0 * (self.child == one)
        noise = (rng.random((TEXTS, OTHERS)) < 0.2) * rng.random((TEXTS, OTHERS))
        latents[:, 1 + len(CHILDREN) :] = noise
        self.latents = sparse.csr_array(latents)
        self.states = latents @ self.rows + 0.05 * rng.standard_normal((TEXTS, WIDTH))

    def writes(self, features: Sequence[int]) -> np.ndarray:
        return self.rows[list(features)]


def test_planted_absorption_is_found_and_nothing_else() -> None:
    planted = Planted(absorbed=True)
    split = BalancedHalves.of(planted.positive, 0)
    found = absorption(
        planted.states, planted.latents, planted.positive, split, PARENT, planted.writes
    )
    assert found.features == (PARENT,)
    assert {one.feature for one in found.absorbers} == set(CHILDREN)  # precision and recall 1
    held_out = split.held_out[planted.positive[split.held_out]]
    counts = np.bincount(planted.child[held_out], minlength=4)
    assert {one.feature: one.texts for one in found.absorbers} == {
        one: counts[one] for one in CHILDREN
    }
    assert found.rate == found.silent == pytest.approx((planted.child[held_out] > 0).mean())
    assert found.probe == 1.0
    assert all(one.cosine > 0.3 for one in found.absorbers)


def test_without_absorption_none_is_found() -> None:
    planted = Planted(absorbed=False)
    split = BalancedHalves.of(planted.positive, 0)
    found = absorption(
        planted.states, planted.latents, planted.positive, split, PARENT, planted.writes
    )
    assert (found.rate, found.silent, found.absorbers) == (0.0, 0.0, ())


def test_a_silent_feature_that_nothing_stands_in_for_is_not_absorbed() -> None:
    planted = Planted(absorbed=True)
    latents = planted.latents.toarray()
    latents[:, list(CHILDREN)] = 0.0
    split = BalancedHalves.of(planted.positive, 0)
    found = absorption(
        planted.states,
        sparse.csr_array(latents),
        planted.positive,
        split,
        PARENT,
        planted.writes,
    )
    assert found.silent > 0
    assert found.rate == 0.0


def test_a_concept_that_is_split_evenly_has_several_features() -> None:
    positive = np.arange(400) % 2 == 0
    halves = np.zeros((400, 4))
    halves[::4, 1] = halves[2::4, 2] = 1.0
    assert sorted(standing_for(sparse.csr_array(halves), positive, 1)) == [1, 2]


def test_a_probe_gives_log_odds() -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((4000, 3)) * [1.0, 5.0, 0.0] + 2
    truth = rng.random(4000) < 1 / (1 + np.exp(-(states @ [2.0, 0.0, 0.0] - 4)))
    found = Probe.of(states, truth)
    np.testing.assert_allclose(found.direction, [2.0, 0.0, 0.0], atol=0.2)
    assert found.bias == pytest.approx(-4, abs=0.4)
