"""Calibrations as tables: their inverses, their ranges, and their place on the card."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import artefacts, calibration
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from steer.artefacts.calibration import MeasuredInterval, MeasuredNull, NullComparison
from steer.artefacts.control_vector import ControlVector
from steer.errors import SteerError
from steer.spec import EffectStrength, KLStrength

DEMO = Path(__file__).parents[3] / "vectors" / "demo" / "vectors"


def test_inverses_go_through_what_was_measured() -> None:
    one = calibration()
    assert one.safe_strength == 2.0
    assert one.strength_for(KLStrength(kl=0.1)) == 1.0
    assert one.strength_for(KLStrength(kl=0.4)) == pytest.approx(2.0, abs=1e-12)
    assert one.strength_for(KLStrength(kl=0.025)) == pytest.approx(0.5)  # the root is linear
    assert one.strength_for(EffectStrength(effect=0.0)) == 0.0
    assert one.strength_for(EffectStrength(effect=0.25)) == 1.0
    assert one.strength_for(EffectStrength(effect=0.625)) == pytest.approx(1.5)
    assert one.strength_for("auto") == one.strength_for(EffectStrength(effect=0.9))
    assert one.kl_at(0.5) == pytest.approx(0.025)


def test_a_flat_stretch_gives_the_smallest_strength() -> None:
    one = calibration(kl=(0, 0.1, 0.1, 0.1), effect=(0, 1, 1, 1))
    assert one.strength_for(EffectStrength(effect=1.0)) == 1.0
    assert one.strength_for(KLStrength(kl=0.1)) == 1.0


@given(
    st.lists(st.floats(0.001, 2), min_size=1, max_size=12),
    st.lists(st.floats(0, 2), min_size=12, max_size=12),
    st.lists(st.floats(0.0001, 1), min_size=2, max_size=9),
)
def test_more_is_never_less(steps: list[float], rises: list[float], shares: list[float]) -> None:
    strengths, kl = [0.0], [0.0]
    for step, rise in zip(steps, rises, strict=False):
        strengths.append(strengths[-1] + step)
        kl.append(kl[-1] + rise)
    one = calibration(kl=tuple(kl), effect=None, strengths=tuple(strengths))
    wanted = [share * kl[-1] for share in sorted(shares) if share * kl[-1] > 1e-9]
    found = [one.strength_for(KLStrength(kl=value)) for value in wanted]
    assert all(a <= b for a, b in pairwise(found))
    for value, strength in zip(wanted, found, strict=True):
        assert 0 <= strength <= one.safe_strength
        assert one.kl_at(strength) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("wanted", "range_"),
    [
        (KLStrength(kl=0.41), "kl can be 0 to 0.4, strengths 0 to 2"),
        (EffectStrength(effect=1.01), "effect can be 0 to 1, strengths 0 to 2"),
        (EffectStrength(effect=-0.1), "effect can be 0 to 1"),
    ],
)
def test_outside_the_range_is_refused_with_the_range(wanted: Any, range_: str) -> None:
    with pytest.raises(SteerError, match=range_) as caught:
        calibration().strength_for(wanted)
    assert (caught.value.code, caught.value.param) == ("outside_calibration", "/strength")


@pytest.mark.parametrize("wanted", ["auto", EffectStrength(effect=0.5)])
def test_without_a_scorer_there_is_no_effect(wanted: Any) -> None:
    with pytest.raises(SteerError, match="without a scorer") as caught:
        calibration(effect=None).strength_for(wanted)
    assert caught.value.code == "not_calibrated"


@pytest.mark.parametrize(
    "fields",
    [
        {"kl": (0.0, 0.3, 0.2)},
        {"kl": (0.1, 0.2, 0.3)},
        {"kl": (0.0,)},
        {"kl": (0.0, float("nan"), 1.0)},
        {"kl": (0.0, 0.1, 0.2, 0.3, 0.4)},
        {"effect": (0.0, 0.5, 0.9)},
        {"effect": (0.0, 1.0)},
        {"strengths": (0.5, 1.0, 2.0)},
        {"strengths": (0.0, 2.0, 1.0)},
    ],
)
def test_tables_that_cannot_be_inverted_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        calibration(**fields)


def test_a_calibrated_vector_is_another_version() -> None:
    plain = ControlVector.of({1: torch.ones(4)}, name="v")
    card = plain.card.model_copy(update={"calibration": calibration()})
    calibrated = ControlVector(plain.directions, card)
    assert calibrated.sha256 != plain.sha256
    read = ControlVector.from_bytes(calibrated.to_bytes(), name="v")
    assert read.card == calibrated.card
    assert read.sha256 == calibrated.sha256
    # Another direction was not calibrated.
    assert (calibrated * 2.0).card.calibration is None


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.safetensors")), ids=lambda path: path.stem)
def test_cards_without_a_calibration_keep_their_hash(path: Path) -> None:
    data = path.read_bytes()
    assert ControlVector.from_bytes(data).to_bytes() == data


def test_nothing_without_a_calibration_speaks_of_one() -> None:
    """SAEs and rows of a catalogue hold cards too, and are compared by their hash."""
    made = artefacts(16, 2)
    cards = [one.card for one in (*made["vectors"].values(), *made["saes"].values())]
    assert all("calibration" not in card.model_dump_json() for card in cards)
    assert all(b"calibration" not in sae.to_bytes() for sae in made["saes"].values())


def test_nulls_stand_on_a_card_only_where_they_were_measured() -> None:
    """Cards from before there were any keep their bytes, and so their hash."""
    old = calibration()
    assert {"nulls", "anti_steered"}.isdisjoint(old.model_dump(mode="json"))
    assert (old.nulls, old.above_null) == (None, None)
    null = MeasuredNull(
        kind="covariance", seed=3, cosine=0.1, strength=1.2, kl=0.2, matched=True, score=0.3
    )
    beside = NullComparison(
        strength=1.0,
        kl=0.2,
        score=0.8,
        unsteered=0.1,
        nulls=(null,),
        p_value=0.5,
        margin=MeasuredInterval(value=0.5, low=0.4, high=0.6),
        above_null=True,
    )
    share = MeasuredInterval(value=0.0, low=0.0, high=0.0)
    new = calibration(nulls=beside, anti_steered=share)
    assert new.above_null
    assert beside.strongest == null
    card = ControlVector.of({1: torch.ones(4)}, calibration=new)
    assert ControlVector.from_bytes(card.to_bytes()).card.calibration == new
