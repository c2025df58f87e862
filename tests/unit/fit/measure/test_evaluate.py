"""Comparisons on a small model, and the bootstrap behind their intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer.artefacts.control_vector import Card, ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.data.instruction import instructed
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.evaluate import (
    ComparedMethod,
    Evaluation,
    Instruction,
    card_instruction,
    evaluate,
    evaluation_steps,
)
from steer.fit.measure.report import write_evaluation_report
from steer.fit.measure.scoring import Score
from steer.spec import parse_spec

PROMPTS = ["one", "two words", "and three more", "four"]


def letters(text: str) -> Score:
    return Score(float(text.count("e") >= 5), valid=text != "")


@pytest.fixture(scope="module")
def methods(engine: TransformersEngine) -> list[ComparedMethod]:
    row = engine._hooked.model.get_output_embeddings().weight[ord("e")].detach()  # type: ignore[index]
    vector = ControlVector.of({2: row / row.norm()}, name="e")
    cache = plans_of(engine, MemoryLibrary({"e": vector}))

    def method(strength: float) -> ComparedMethod:
        item = {"kind": "add", "vector": "e", "strength": strength}
        return ComparedMethod(f"e:{strength:g}", cache.plan(parse_spec({"interventions": [item]})))

    return [method(0.0), method(50.0)]


def run(engine: TransformersEngine, methods: list[ComparedMethod], **fields: Any) -> Evaluation:
    told = Instruction("Say e.")
    return evaluate(
        engine, PROMPTS, methods, letters, instruction=told, max_tokens=6, resamples=400, **fields
    )


def test_a_method_stands_beside_its_nulls(
    engine: TransformersEngine, methods: list[ComparedMethod]
) -> None:
    plain, _, nothing, steered = run(engine, methods, nulls=2).rows
    assert (plain.nulls, plain.no_nulls) == (None, None)
    assert nothing.nulls is None
    assert "adds nothing" in str(nothing.no_nulls)
    one = steered.nulls
    assert one is not None
    assert (one.strength, one.score) == (1.0, steered.score.value)
    assert [n.kind for n in one.nulls] == ["isotropic"] * 2 + ["covariance"] * 2
    assert one.above_null
    assert one.p_value == pytest.approx(0.2)
    assert steered.anti_steered.value == 0
    without = run(engine, methods, nulls=0).rows[-1]
    assert (without.nulls, without.no_nulls) == (None, "no nulls were asked for")


def test_the_prompt_only_baseline_is_always_there(
    engine: TransformersEngine, methods: list[ComparedMethod]
) -> None:
    steps: list[int] = []
    found = run(engine, methods, progress=steps.append)
    assert [row.name for row in found.rows] == ["unsteered", "prompt only", "e:0", "e:50"]
    assert [row.kind for row in found.rows] == ["unsteered", "prompt", "steering", "steering"]
    assert sum(steps) == evaluation_steps(len(PROMPTS), 2) == len(PROMPTS) * 4 + 2 * 8 * 5
    unsteered, prompt, nothing, steered = found.rows
    assert nothing.score == unsteered.score
    ratio = nothing.perplexity_ratio
    assert (ratio.value, ratio.high) == pytest.approx((1, 1), abs=1e-6)
    assert (prompt.over_prompt.value, prompt.over_prompt.low) == (0, 0)
    assert (steered.score.value, steered.score.low) == (1, 1)
    assert steered.over_prompt.value == 1 - prompt.score.value
    assert steered.perplexity_ratio.value < 1
    # The unsteered model that was told so is another prompt, not another plan.
    told = run(engine, methods[:1]).rows[1].examples
    assert told == prompt.examples


def test_seeds_repeat(engine: TransformersEngine, methods: list[ComparedMethod]) -> None:
    assert run(engine, methods, seed=3) == run(engine, methods, seed=3)


def test_names_must_differ(engine: TransformersEngine, methods: list[ComparedMethod]) -> None:
    for given in ([methods[0], methods[0]], [ComparedMethod("unsteered", methods[0].plan)], []):
        with pytest.raises(SteerError) as caught:
            run(engine, given)
        assert caught.value.code == "invalid_option"


def test_the_report_is_a_folder(
    engine: TransformersEngine, methods: list[ComparedMethod], tmp_path: Path
) -> None:
    found = run(engine, methods)
    write_evaluation_report(tmp_path, found, title="letters")
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["rows"][1]["name"] == "prompt only"
    assert figures["instruction"] == {
        "text": "Say e.",
        "source": "given",
        "place": "system",
    }
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "| e:50 | 1.00 [1.00, 1.00] |" in (tmp_path / "report.md").read_text()


def test_how_a_prompt_is_told() -> None:
    user = {"role": "user", "content": "Hi"}
    assert instructed("Hi", "Be brief.") == "Be brief.\nHi"
    assert instructed([user], "Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    system = {"role": "system", "content": "You are kind."}
    told = instructed([system, user], "Be brief.")
    assert told[0] == {"role": "system", "content": "You are kind.\nBe brief."}
    assert system["content"] == "You are kind."


def test_what_a_card_says_in_words() -> None:
    card = Card(width=1, layers=(0,), description="Is brief.")
    assert card_instruction(card) == Instruction("Is brief.", "card description")
    better = card.model_copy(update={"provenance": {"instruction": "Be brief."}})
    assert card_instruction(better) == Instruction("Be brief.", "card instruction")
    # A vector that was made says where its model listens; what is no place says nothing.
    for place, told_at in (("after", "after"), ("nowhere", "system"), (["after"], "system")):
        made = card.model_copy(update={"provenance": {"instruction": "Be brief.", "place": place}})
        assert card_instruction(made) == Instruction("Be brief.", "card instruction", told_at)
    assert card_instruction(Card(width=1, layers=(0,))) is None


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = Resamples.draw(400, seed=1).mean(values.tolist())
    error = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_intervals_cover_at_their_rate() -> None:
    draw = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        one = Resamples.draw(60, resamples=300, seed=seed).mean(draw.normal(size=60).tolist())
        covered += one.low <= 0 <= one.high
    assert 0.88 <= covered / 200 <= 0.99


def test_differences_are_paired() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = Resamples.draw(50).difference((values + 1).tolist(), values.tolist())
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_unjudged_answers_do_not_count() -> None:
    draws = Resamples.draw(4, resamples=200)
    assert draws.mean([1.0, math.nan, 0.0, math.nan]).value == 0.5
    assert math.isnan(draws.mean([math.nan] * 4).value)
