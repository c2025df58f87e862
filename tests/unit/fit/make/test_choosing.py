"""Which trials count as sound, and which is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.fit.make import choosing
from steer.fit.make.choosing import RUN_OFF, Choice, Ground, choose
from steer.fit.make.trials import Trial, Use, sound_trials
from steer.fit.measure.answers import Answer
from steer.fit.measure.scoring import Score

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


def trial(kl: float, valid: int, both: float, use: Use = ONE) -> Trial:
    """On the dozen questions that everything is tried on, of which `valid` answers are sound."""
    return Trial(
        use, budget=kl, strength=kl, kl=kl, score=both, valid=valid / 12, both=both, example=""
    )


def chosen(
    monkeypatch: pytest.MonkeyPatch, fine: Sequence[Trial], again: dict[float, int], more: int = 20
) -> tuple[Choice, list[int]]:
    """What is chosen among `fine`; run again on `more` questions, the trial of each KL has `again`
    sound answers. And what progress was told."""
    told: list[int] = []
    ran = iter([[fine[0]], list(fine)])  # the coarse grid, and the fine one

    def answers(_engine: Any, prompts: Any, plans: Sequence[float], *_: Any, **named: Any) -> Any:
        found = []
        for asked, kl in zip(prompts, plans, strict=True):
            scores = [Score(1.0, n < again[kl]) for n in range(len(asked))]
            found.append([Answer((), (), "", (), score=one) for one in scores])
            named["progress"](len(asked))
        return found

    monkeypatch.setattr(choosing, "_tried", lambda *_: next(ran, []))
    monkeypatch.setattr(choosing, "answers_under", answers)
    nothing: Any = None
    ground = Ground(nothing, ["?"] * 12, nothing, nothing, 0.1, nothing, told.append)
    plans: Any = SimpleNamespace(plan=lambda _use, strength: strength)
    return choose(ground, plans, (), more=["?"] * more), told


def test_what_is_unsound_on_more_questions_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    lucky, gentle = trial(0.7, 12, 0.9), trial(0.4, 12, 0.6)
    found, told = chosen(monkeypatch, [lucky, gentle], {0.7: 12, 0.4: 20})

    assert (found.best.kl, found.best.valid) == (0.4, 1.0)
    assert {one.kl: one.valid for one in found.run_off} == pytest.approx({0.7: 24 / 32, 0.4: 1.0})
    assert sum(told) == RUN_OFF * 20


def test_what_seemed_unsound_may_be_sound_on_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = chosen(monkeypatch, [trial(0.7, 10, 0.9)], {0.7: 20})
    assert found.best.valid == pytest.approx(30 / 32)

    with pytest.raises(SteerError) as caught:
        chosen(monkeypatch, [trial(0.7, 10, 0.9)], {0.7: 17})
    assert caught.value.code == "no_sound_use"


def test_where_none_is_sound_on_more_the_soundest_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, _ = chosen(monkeypatch, [trial(0.7, 12, 0.9), trial(0.6, 12, 0.8)], {0.7: 15, 0.6: 16})
    assert found.best.kl == 0.6


def test_without_more_questions_nothing_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = chosen(monkeypatch, [trial(0.7, 12, 0.9), trial(0.4, 12, 0.6)], {}, more=0)
    assert (found.best.kl, found.run_off, sum(told)) == (0.7, (), 0)
