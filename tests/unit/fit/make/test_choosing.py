"""Which trials count as sound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.fit.make.choosing import Trial, Use, sound_trials

ONE, OTHER = Use("last", (1, 2), "all"), Use("response", (1, 2), "all")


def trials(*shares: float, use: Use = ONE) -> list[Trial]:
    """Of one use, at KLs of .1, .2 …."""
    return [
        Trial(use, budget=kl, strength=1.0, kl=kl, score=0.5, valid=valid, both=0.5, example="")
        for kl, valid in ((0.1 * n, valid) for n, valid in enumerate(shares, 1))
    ]


@pytest.mark.parametrize(
    ("shares", "share", "kept"),
    [
        ((1.0, 1.0, 0.5), 0.95, (0, 1)),
        ((10 / 12, 11 / 12, 9 / 12), 0.9, ()),  # .92 between .83 and .75 is no more than .875
        ((11 / 12, 1.0, 0.8), 0.95, (0, 1)),  # the two make .958 together
        ((0.5, 0.5, 1.0), 0.9, ()),
        ((1.0,), 0.95, (0,)),
        ((0.94,), 0.95, ()),
    ],
)
def test_a_share_that_rises_with_the_kl_is_noise(
    shares: tuple[float, ...], share: float, kept: tuple[int, ...]
) -> None:
    ran = trials(*shares)
    assert sound_trials(ran, share) == [ran[n] for n in kept]


def test_uses_are_smoothed_apart() -> None:
    ran = [*trials(0.5, 0.5), *trials(1.0, 1.0, use=OTHER)]
    assert [one.use for one in sound_trials(ran, 0.9)] == [OTHER, OTHER]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_what_is_sound_is_sound_at_less(sound: list[int]) -> None:
    ran = trials(*(n / 12 for n in sound))
    kept = sound_trials(ran, 0.9)
    assert kept == ran[: len(kept)]
