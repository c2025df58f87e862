"""The whole way on a small random model, which has no idea what it is told but is moved by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.data.where import WHERES
from steer.fit.make.choosing import COARSE, FINE, grid
from steer.fit.make.contrast import AnswerPair, contrast_states, directions
from steer.fit.make.made import Made
from steer.fit.make.making import make, work_of
from steer.fit.make.report import lines, rows, write_made_report
from steer.fit.make.trials import likely_strength
from steer.fit.make.wish import QuestionParts, Wish
from steer.fit.measure.answers import Answer
from steer.fit.measure.scoring import Score
from steer.fit.methods.diffmean import DifferenceOfMeans

PROMPTS = [f"{word} {n}" for n in range(8) for word in ("how", "why", "who")]
WISH = Wish("be loud!", "loud", opposite="be quiet", place="after", nulls=1, max_tokens=6, seed=1)


@pytest.fixture(scope="module")
def made(lively: TransformersEngine) -> Made:
    return make(lively, WISH, PROMPTS, scorer=letters)


def letters(text: str) -> Score:
    return Score(min(1.0, sum(character.isalpha() for character in text) / 6))


def test_the_choice_stands_on_the_card(made: Made) -> None:
    best, card = made.choice.best, made.vector.card

    assert card.default_layers == best.use.layers
    assert card.default_where == WHERES[best.use.where]
    assert card.default_strength == pytest.approx(best.strength, rel=1e-3)
    assert card.provenance["instruction"] == "be loud!"
    assert card.provenance["chosen_by"] == "effect"
    assert set(card.layers) == set(card.measures) == {0, 1, 2}


def test_the_best_is_the_highest_of_the_sound_trials(made: Made) -> None:
    budgets = [one.budget / made.said_kl for one in made.choice.trials]
    uses = grid(range(3), ("response", "last"))

    assert budgets[: len(uses)] == pytest.approx([COARSE] * len(uses))
    assert {round(budget, 6) for budget in budgets[len(uses) :]} == set(FINE)
    fine = made.choice.trials[len(uses) :]
    assert made.choice.best in fine
    assert any(one.use.where == "onward" for one in fine)
    floor = min(one.valid for one in fine if one.valid >= made.choice.best.valid)
    assert all(one.both <= made.choice.best.both for one in fine if one.valid > floor)


def test_the_check_has_words_and_chance_beside_it(made: Made) -> None:
    against = made.check.comparison

    assert [row.name for row in made.check.rows] == ["unsteered", "in words", "steered"]
    assert [null.kind for null in against.nulls] == ["isotropic", "covariance", "shuffled"]
    assert against.p_value is not None
    assert against.p_value >= 1 / 4
    assert made.works == (against.above_null is True)
    assert made.check.questions == len(QuestionParts.of(PROMPTS, WISH.seed).checked)


def test_it_is_the_same_again_and_counts_its_steps(lively: TransformersEngine, made: Made) -> None:
    done: list[int] = []

    again = make(lively, WISH, PROMPTS, scorer=letters, progress=done.append)

    assert again.vector.sha256 == made.vector.sha256
    assert again.as_json() == made.as_json()
    assert sum(done) == work_of(WISH, len(PROMPTS), 3)


def test_a_report_is_a_page_figures_and_a_picture(made: Made, tmp_path: Path) -> None:
    write_made_report(tmp_path / "loud", made)

    page = (tmp_path / "loud" / "report.md").read_text("utf-8")
    assert all(row.name in page for row in rows(made))
    assert all(line in page for line in lines(made))
    figures = json.loads((tmp_path / "loud" / "report.json").read_text("utf-8"))
    assert figures["vector"] == "loud"
    assert (tmp_path / "loud" / "made.png").stat().st_size > 1000


def test_words_that_do_nothing_are_refused(lively: TransformersEngine) -> None:
    same = replace(WISH, opposite=WISH.instruction)

    with pytest.raises(SteerError, match="told apart 50% of the time") as caught:
        make(lively, same, PROMPTS, scorer=letters)
    assert (caught.value.code, caught.value.param) == ("instruction_not_followed", "/instruction")


def test_without_a_place_the_model_is_told_where_it_listens(lively: TransformersEngine) -> None:
    found = make(lively, replace(WISH, place=None, nulls=0), PROMPTS, scorer=letters)

    assert found.place in ("system", "after")
    assert found.check.comparison.p_value is None
    assert not found.works


def test_contrasts_are_of_both_sides_own_answers(lively: TransformersEngine) -> None:
    def answer(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Answer:
        return Answer(prompt, tokens, "")

    exchanges = [
        AnswerPair(answer((65, 66, 67), (70, 71)), answer((65, 68), (72,))),
        AnswerPair(answer((65,), ()), answer((65,), (70,))),  # nothing to read
        AnswerPair(answer((66, 66), (73,)), answer((66, 67), (70, 71, 72))),
    ]

    states = contrast_states(lively, exchanges, site="resid_post", layers=[0, 2])

    assert set(states) == {"response", "last"}
    for by_layer in states.values():
        assert [tuple(side.shape) for side in by_layer[2]] == [(2, 32), (2, 32)]
    told, opposed = states["response"][2]
    found = directions(states["response"], DifferenceOfMeans)
    assert found[2].tolist() == pytest.approx((told - opposed).mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("n_layers", [1, 2, 6, 30])
def test_a_grid_has_no_use_twice_and_no_layer_outside(n_layers: int) -> None:
    uses = grid(range(n_layers), ("response",))

    assert len(set(uses)) == len(uses) >= 1
    assert all(use.layers and set(use.layers) <= set(range(n_layers)) for use in uses)
    assert all(use.layers == tuple(range(use.layers[0], use.layers[-1] + 1)) for use in uses)


def test_the_first_strength_grows_with_the_root_of_the_kl() -> None:
    rows = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([0.0, 5.0])}
    measures = {
        n: LayerMeasure(separation=1.0, positive=1.0, negative=0.0, residual_norm=norm)
        for n, norm in ((0, 10.0), (1, 50.0))
    }
    vector = ControlVector.of(rows, measures=measures)

    first = likely_strength(vector, (0, 1), 0.4)

    assert first == pytest.approx(0.47 * 0.4**0.5 / (5 / 10 + 5 / 50))
    assert likely_strength(vector, (0, 1), 1.6) == pytest.approx(2 * first)
    assert likely_strength(vector, (1,), 0.4) > first
