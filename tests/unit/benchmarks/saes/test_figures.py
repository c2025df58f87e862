"""The arithmetic of the experiments with SAEs, on planted answers, gains and effects."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks.saes import concepts, doses, intervention, memory, steerer
from benchmarks.saes.attribute import _check, unused
from benchmarks.saes.doses import Curve
from benchmarks.saes.setting import clear_features, is_clear
from benchmarks.saes.uses import clamp, differences, like
from steer.artefacts.sae import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.fit.features.intervention import InterventionResult
from steer.fit.make.wish import QuestionParts
from steer.fit.measure.answers import Answer
from steer.fit.measure.nulls.matching import Match
from steer.fit.measure.scoring import Score
from steer.registry.features.scores import InterventionScore


def answers(scores: Sequence[float], *, sound: bool = True) -> list[Answer]:
    return [Answer((), (1,), f"says {one}", score=Score(one, valid=sound)) for one in scores]


MATCH = Match(2.0, 0.3, 2, reached=True)


def test_a_row_has_its_score_its_differences_and_its_chance() -> None:
    names = ["unsteered", "in words", "vector as shipped", "vector", "feature", "a", "b", "c"]
    scores = [[0.1, 0.1], [0.9, 0.9], [0.8, 0.8], [0.7, 0.7], [0.5, 0.3], [0.4] * 2, [0.4] * 2]
    said = [answers(one) for one in [*scores, [0.2, 0.2]]]
    rows = concepts.table(names, [None, None, *[MATCH] * 6], said, by_chance=3)
    feature = rows[4]
    assert feature["score"].value == pytest.approx(0.4)
    assert feature["over unsteered"].value == pytest.approx(0.3)
    assert feature["over vector"].value == pytest.approx(-0.3)
    # Two of three nulls score as much.
    assert feature["p"] == pytest.approx(3 / 4)
    assert rows[3]["p"] == pytest.approx(1 / 4)
    # What is at no common KL, and chance itself, has no p.
    assert [rows[n]["p"] for n in (0, 1, 2, 5, 6, 7)] == [None] * 6
    assert feature["wrong way"].value == 0
    assert feature["valid"].value == 1


def test_chance_is_shown_by_its_mean_and_its_highest() -> None:
    names = ["unsteered", "in words", "vector as shipped", "vector", "random features 0"]
    said = [answers([0.1, 0.1])] * 4 + [answers([0.2, 0.4]), answers([0.5, 0.7])]
    rows = concepts.table(
        [*names, "random features 1"], [None, None, *[MATCH] * 4], said, by_chance=2
    )
    shown = concepts.lines({"rows": rows})
    assert [one[0] for one in shown] == [*names[:4], "random features"]
    assert shown[-1][2] == "0.45 (highest 0.60)"


def test_rates_that_follow_the_strength_are_told_from_others() -> None:
    rising = [answers([1.0] * n + [0.0] * (6 - n)) for n in range(7)]
    still = [answers([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])] * 7
    found = steerer.judged("own", {"own": rising, "other": still, "third": rising[::-1]})
    assert found["rates"]["own"] == pytest.approx([n / 6 for n in range(7)])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["others move"] == pytest.approx({"other": 0.0, "third": 1.0})
    assert found["met"] == {"spearman": True, "others": False}
    assert found["rise"].value == pytest.approx(1.0)


def test_others_are_held_to_account_while_answers_are_sound() -> None:
    own = [*[answers([0.0, 1.0])] * 2, answers([1.0, 1.0], sound=False)]
    other = [answers([0.0, 0.0]), answers([0.0, 0.0]), answers([1.0, 1.0])]
    found = steerer.judged("own", {"own": own, "other": other})
    assert found["others move"] == {"other": 1.0}
    assert found["others move where sound"] == {"other": 0.0}


def test_a_rate_that_never_changes_has_no_correlation() -> None:
    assert steerer.spearman([0.2, 0.2, 0.2]) == 0.0
    assert steerer.moves([0.3, 0.1, 0.6]) == pytest.approx(0.3)


def test_a_curve_that_rises_above_chance_and_one_that_falls() -> None:
    effects = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    nulls = np.array([[0.0, 0.15], [0.0, 0.1], [0.0, 0.1], [0.0, 0.1], [0.0, 0.1], [0.7, 0.1]])
    rising = doses.beside(Curve((1.0,) * 6, doses.KLS, effects), nulls)
    assert (rising["spearman"], rising["rises"]) == (pytest.approx(1.0), True)
    assert rising["above"] == [False, True, True, True, True, False]
    assert rising["p"][:2] == pytest.approx([2 / 3, 1 / 3])
    falling = doses.beside(Curve((1.0,) * 6, doses.KLS, effects[::-1]), nulls)
    assert (falling["spearman"], falling["rises"]) == (pytest.approx(-1.0), False)
    found = doses.summary([rising, falling])
    assert (found["rise"], found["spearman ≥ .9"]) == (1, 1)
    assert found["above every null at each dose"] == [1, 2, 2, 2, 2, 0]
    assert found["mean effect"] == pytest.approx([0.35] * 6)


def test_a_fall_within_the_slack_still_rises() -> None:
    near = (0.1, 0.1 - doses.SLACK / 2, 0.2, 0.3, 0.4, 0.5)
    assert doses.beside(Curve((), (), near), np.zeros((6, 1)))["rises"]
    far = (0.1, 0.1 - 2 * doses.SLACK, 0.2, 0.3, 0.4, 0.5)
    assert not doses.beside(Curve((), (), far), np.zeros((6, 1)))["rises"]


def gained(gain: float, others: float, low: float, high: float, p: float) -> InterventionScore:
    return InterventionScore(
        kl=0.3, reached=True, gain=gain, shuffled=others, null=(low + high) / 2, null_low=low,
        null_high=high, p=p,
    )  # fmt: skip


def test_labels_are_summed_up_over_features() -> None:
    scores = {1: gained(2.0, 0.5, -1.0, 1.0, 0.05), 2: gained(1.0, 0.5, 0.2, 0.4, 0.5)}
    found = intervention.summary(InterventionResult(scores, 0.95))
    assert found["met"]
    assert found["own"].value == pytest.approx(1.5)
    assert found["own − others"].value == pytest.approx(1.0)
    assert found["own − chance"].value == pytest.approx(1.35)
    assert (found["chance contains 0"], found["p ≤ .05"]) == (1, 1)
    assert not intervention.summary(InterventionResult(scores, 0.89))["met"]


def test_memory_is_stated_for_each() -> None:
    steps = {"a": {"resident": 130.0, "peak": 190.0}, "b": {"resident": 120.0, "peak": 125.0}}
    assert memory.each_of(100.0, steps, 10) == {"MiB of each": 2.0, "peak MiB of each": 9.0}


@pytest.mark.parametrize(
    ("tokens", "clear"),
    [
        ((" property", "Property"), True),
        (("the",), False),
        ((" property", " information"), False),
        (("9999",), False),
        ((), False),
    ],
)
def test_clear_labels_name_one_word(tokens: tuple[str, ...], clear: bool) -> None:
    assert is_clear(tokens) == clear


def test_features_are_drawn_among_the_clear_ones_alone() -> None:
    labels = {n: FeatureLabel(text="", tokens=("house",) if n % 2 else ("a",)) for n in range(20)}
    drawn = clear_features(labels, 6, seed=3)
    assert drawn == clear_features(labels, 6, seed=3)
    assert all(one % 2 for one in drawn)
    with pytest.raises(ValueError, match="10 features have a label that names one word, and 11"):
        clear_features(labels, 11, seed=3)


def test_questions_that_are_held_out_were_used_for_nothing() -> None:
    asked = [f"question {n}" for n in range(160)]
    parts = QuestionParts.of(asked, 0)
    found = unused(parts, asked, 60)
    assert found[:20] == parts.checked
    assert len(set(found)) == 60
    assert not set(found) & {*parts.fitted, *parts.chosen, *parts.run_off}
    with pytest.raises(ValueError, match="80 questions are held out, and 81"):
        unused(parts, asked, 81)


def test_a_vector_of_other_questions_is_refused() -> None:
    story = dict.fromkeys(("instruction", "opposite", "place", "seed", "temperature"), "x")
    with pytest.raises(ValueError, match="does not say its data_sha256"):
        _check("v", story, "0")
    with pytest.raises(ValueError, match="made on other questions"):
        _check("v", {**story, "data_sha256": "1"}, "0")
    _check("v", {**story, "data_sha256": "0"}, "0")


def sae(rows: torch.Tensor) -> SAE:
    return SAE.of("standard", W_enc=rows.T, W_dec=rows, b_dec=torch.zeros(rows.shape[1]), layer=0)


def test_features_clamped_together_keep_their_shares() -> None:
    way = clamp(sae(torch.eye(4)), [0, 2], "add", [1.0, 0.5])
    assert way.item(2.0)["value"] == [2.0, 1.0]
    assert way.length == pytest.approx(math.sqrt(1.25))


def test_shares_are_what_the_told_side_has_more() -> None:
    assert differences([[2.0, 1.0, 0.0]], [[0.0, 0.0, 3.0]]) == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="none of the features is more active"):
        differences([[0.0]], [[1.0]])


def test_features_of_chance_fire_as_often_and_know_nothing_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 64, generator=generator)
    rates = torch.arange(200) / 200
    rows[90:100] = rows[100]  # ten twins, nearly as often
    found = like([100, 20], rates, rows, 5, seed=1)
    assert found == like([100, 20], rates, rows, 5, seed=1)
    drawn = [one for each in found for one in each]
    assert len(set(drawn)) == 10
    assert not {*range(90, 101), 20} & set(drawn)
    assert all(abs(one[0] - 100) <= 30 and abs(one[1] - 20) <= 30 for one in found)
    with pytest.raises(ValueError, match="too few features are left"):
        like([100], rates, rows, 200, seed=1)
