"""A fitted vector's use, chosen on the pairs that it was not fitted on."""

from __future__ import annotations

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.data.where import WHERES
from steer.fit.make.for_pairs import choose_for_pairs, most_steps
from steer.fit.methods.fitting import fit
from steer.prompts import Marked

PAIRS = [Pair(f"be loud! {n}", f"be quiet {n}") for n in "abcdefghijklmnop"]


@pytest.fixture(scope="module")
def vector(lively: TransformersEngine) -> ControlVector:
    return fit(lively, PairSet.of(PAIRS[:8]), name="loud")


def test_the_use_is_one_that_was_tried(lively: TransformersEngine, vector: ControlVector) -> None:
    done: list[int] = []

    found = choose_for_pairs(lively, vector, PAIRS[8:], progress=done.append)

    assert found.choice is not None
    best, card = found.choice.best, found.vector.card
    assert card.default_layers == best.use.layers
    assert card.default_where == WHERES[best.use.where]
    assert card.default_strength == pytest.approx(best.strength, rel=1e-3)
    assert card.provenance["chosen_by"] == "effect"
    assert {trial.use.where for trial in found.choice.trials} == {"all", "onward"}
    assert all(torch.equal(found.vector[n], vector[n]) for n in card.layers)
    assert sum(done) == most_steps(8)


def test_a_place_that_was_asked_for_is_kept(
    lively: TransformersEngine, vector: ControlVector
) -> None:
    found = choose_for_pairs(lively, vector, PAIRS[8:], where="last")

    assert found.choice is not None
    assert {trial.use.where for trial in found.choice.trials} == {"last"}


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (
            [Pair(Marked("how are you", response="well"), Marked("how are you", response="no"))]
            * 6,
            "of 6 pairs that it was not fitted on, 0 ask for different things",
        ),
        (PAIRS[8:10], "of 2 pairs"),
    ],
)
def test_where_the_effect_cannot_be_seen_the_card_stays(
    lively: TransformersEngine, vector: ControlVector, pairs: list[Pair], reason: str
) -> None:
    done: list[int] = []

    found = choose_for_pairs(lively, vector, pairs, progress=done.append)

    assert found.choice is None
    assert found.vector is vector
    assert reason in found.note
    assert sum(done) == most_steps(len(pairs))
