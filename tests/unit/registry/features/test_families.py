"""Families of features: planted ones are found, and nothing is made of chance."""

from __future__ import annotations

import numpy as np

from steer.registry.features.families import families, families_of
from steer.registry.features.survey import ACTIVE_NONE

D_SAE, WIDTH, TOKENS = 120, 32, 12_000
PLANTED = {10: (11, 12, 13, 14), 30: (31, 32, 33), 50: (51, 52, 53, 54, 55)}
DENSE_ONE = 100


def sampled(*, planted: bool = True) -> np.ndarray:
    """Tokens on a few of which a head fires with one or two of its members, and on all of which
    others fire at random."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(TOKENS):
        active = set(rng.choice(np.arange(60, 100), 3, replace=False).tolist())
        if rng.random() < 0.4:
            active.add(DENSE_ONE)
        if planted and rng.random() < 0.2:
            head = int(rng.choice(list(PLANTED)))
            members = PLANTED[head]
            active |= {head, *rng.choice(members, rng.integers(1, 3), replace=False).tolist()}
        row = sorted(active)
        rows.append(row + [ACTIVE_NONE] * (WIDTH - len(row)))
    return np.array(rows, np.int32)


def test_planted_families_are_found() -> None:
    found = {one.head: one for one in families(sampled(), D_SAE)}
    for head, members in PLANTED.items():
        mine, true = set(found[head].members), set(members)
        f1 = 2 * len(mine & true) / (len(mine) + len(true))
        assert f1 >= 0.9
        assert min(found[head].shared) > 0.9
    assert all(DENSE_ONE not in one.features for one in found.values())


def test_what_fires_together_by_chance_is_no_family() -> None:
    assert families(sampled(planted=False), D_SAE) == []


def test_the_families_of_a_feature() -> None:
    found = families(sampled(), D_SAE)
    assert families_of(found, 10)[0].head == 10
    assert 12 in families_of(found, 12)[0].members
    assert families_of(found, 61) == []


def test_a_family_within_a_family_is_found_too() -> None:
    """1 fires with 2, 7 or 8, or with 3, which stands above 4, 5 and 6: less than the share of all
    at which one of two families is left out."""
    rng = np.random.default_rng(0)
    rows = np.full((4000, 4), ACTIVE_NONE, np.int32)
    for place in range(300):
        rows[place, :2] = (1, rng.choice([2, 7, 8]))
        if place % 2:
            rows[place, 1:3] = (3, rng.integers(4, 7))
    found = families(rows, 10)
    assert {one.head: set(one.members) for one in found} == {
        1: {2, 3, 4, 5, 6, 7, 8},
        3: {4, 5, 6},
    }


def test_no_tokens_make_no_families() -> None:
    assert families(np.zeros((0, 32), np.int32), 10) == []
