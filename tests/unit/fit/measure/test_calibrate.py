"""Calibration on a small model whose answers a vector can force."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.artefacts.calibration import MeasuredDose, SafeLimits
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.measure.answers import answers_under
from steer.fit.measure.calibrate import (
    CalibratedVector,
    calibrate,
    mean_kl,
    prompts_sha256,
    steps_of,
)
from steer.fit.measure.doses import calibrated_range
from steer.fit.measure.nulls.comparison import told
from steer.fit.measure.report import write_calibration_report
from steer.fit.measure.scoring import Score
from steer.spec import Where, parse_spec

PROMPTS = ["one", "two words", "and three more", "four", "the fifth"]
STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


@pytest.fixture(scope="module")
def vector(engine: TransformersEngine) -> ControlVector:
    # The output row of "e": far along it, every answer is made of that letter.
    row = engine._hooked.model.get_output_embeddings().weight[ord("e")].detach()  # type: ignore[index]
    return ControlVector.of({1: row, 2: row / row.norm()}, name="e", default_layers=(2,))


def letters(text: str) -> Score:
    return Score(text.count("e") / max(len(text), 1), valid=True)


def run(engine: TransformersEngine, vector: ControlVector, **fields: Any) -> CalibratedVector:
    arguments: dict[str, Any] = {"strengths": STRENGTHS, "max_tokens": 6, "scorer_name": "e"}
    scorer = fields.pop("scorer", letters)
    return calibrate(engine, vector, PROMPTS, scorer, **{**arguments, **fields})


@pytest.fixture(scope="module")
def found(engine: TransformersEngine, vector: ControlVector) -> CalibratedVector:
    return run(engine, vector, limits=SafeLimits(perplexity_ratio=1000, drop=0.2))


def test_what_stands_on_the_card(found: CalibratedVector, engine: TransformersEngine) -> None:
    one = found.vector.card.calibration
    assert one is not None
    assert one is found.calibration
    assert (one.model, one.layers, one.site, one.where) == ("tiny", (2,), "resid_post", None)
    assert [dose.strength for dose in one.doses] == [0, *STRENGTHS]
    assert (one.doses[0].kl, one.doses[0].perplexity_ratio) == (0, 1)
    assert (one.prompts, one.scorer, one.max_tokens, one.seed) == (5, "e", 6, 0)
    assert one.data_sha256 == prompts_sha256(PROMPTS)
    assert one.doses[-1].score is not None
    assert one.doses[-1].score > 0.9
    assert one.doses[-1].kl > one.doses[1].kl > 0
    assert one.effect is not None
    assert (one.effect[0], one.effect[-1]) == (0, 1)
    assert one.monotonicity is not None
    assert one.monotonicity > 0.8


def test_the_same_again_is_the_same_file(
    engine: TransformersEngine, vector: ControlVector, found: CalibratedVector
) -> None:
    again = run(engine, vector, limits=SafeLimits(perplexity_ratio=1000, drop=0.2))
    assert again.vector.to_bytes() == found.vector.to_bytes()
    assert found.vector.sha256 != vector.sha256


def test_nulls_stand_on_the_card_beside_it(found: CalibratedVector) -> None:
    one = found.calibration.nulls
    assert one is not None
    assert [null.kind for null in one.nulls] == ["isotropic"] * 4 + ["covariance"] * 4
    assert all(null.matched for null in one.nulls)
    assert [null.kl for null in one.nulls] == pytest.approx([one.kl] * 8, rel=0.06)
    dose = next(d for d in found.calibration.doses if d.strength == one.strength)
    assert dose.score == one.score
    assert dose.kl == pytest.approx(one.kl)
    assert found.auto is not None
    assert one.strength >= found.auto
    assert one.strongest is not None
    assert one.score > one.strongest.score
    assert one.p_value == pytest.approx(1 / 9, rel=1e-5)
    assert (one.above_null, found.calibration.above_null) == (True, True)
    wrong = found.calibration.anti_steered
    assert wrong is not None
    assert wrong.low <= wrong.value == 0 <= wrong.high


def test_a_vector_that_does_what_chance_does_is_not_above_its_nulls(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    """The scorer likes whatever is unlike the unsteered answers, so any push scores."""
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=0)
    [answers] = answers_under(engine, [PROMPTS], [None], letters, sampling=sampling)
    plain = {one.text for one in answers}
    found = run(
        engine,
        vector,
        scorer=lambda text: Score(float(text not in plain)),
        limits=SafeLimits(perplexity_ratio=1e9, drop=1),
        strengths=(2.0, 4.0),
    )
    one = found.calibration.nulls
    assert one is not None
    assert one.score == 1
    assert (one.above_null, found.calibration.above_null) == (False, False)
    assert one.p_value is not None
    assert one.p_value > 0.5
    assert "not called steering" in told(one)
    # A strength that a request names by its effect says so.
    spec = {"interventions": [{"kind": "add", "vector": "e", "strength": "auto"}]}
    plan = plans_of(engine, MemoryLibrary({"e": found.vector})).plan(parse_spec(spec))
    assert plan.resolved_strengths[0]["above_null"] is False


def test_without_nulls_the_card_says_that_there_were_none(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    found = run(engine, vector, nulls=0, limits=SafeLimits(perplexity_ratio=1000, drop=0.2))
    one = found.calibration.nulls
    assert one is not None
    assert (one.nulls, one.p_value, one.margin, one.above_null) == ((), None, None, None)
    assert "no nulls were run" in told(one)
    assert (
        run(engine, vector, scorer=None, limits=SafeLimits(perplexity_ratio=1000)).calibration.nulls
        is None
    )


def test_with_a_refit_labels_are_shuffled_too(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    def refit(seed: int) -> dict[int, torch.Tensor]:
        return {2: torch.randn(32, generator=torch.Generator().manual_seed(seed))}

    steps: list[int] = []
    found = run(
        engine,
        vector,
        nulls=1,
        refit=refit,
        limits=SafeLimits(perplexity_ratio=1000, drop=0.2),
        progress=steps.append,
    )
    assert found.calibration.nulls is not None
    assert [n.kind for n in found.calibration.nulls.nulls] == [
        "isotropic",
        "covariance",
        "shuffled",
    ]
    assert sum(steps) == steps_of(PROMPTS, STRENGTHS, nulls=1, shuffled=True)


def test_a_kl_that_is_asked_for_is_had(engine: TransformersEngine, found: CalibratedVector) -> None:
    """On the calibration's own prompts: exact at a measured strength, close between."""
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=0)
    [plain] = answers_under(engine, [PROMPTS], [None], letters, sampling=sampling)
    cache = plans_of(engine, MemoryLibrary({"e": found.vector}))

    def had(kl: float) -> float:
        spec = {"interventions": [{"kind": "add", "vector": "e", "strength": {"kl": kl}}]}
        values = mean_kl(engine, plain, cache.plan(parse_spec(spec)))
        return sum(values) / len(values)

    table = found.calibration.kl
    assert had(table[3]) == pytest.approx(table[3], rel=1e-3)
    between = (table[3] + table[4]) / 2
    assert had(between) == pytest.approx(between, rel=0.15)


def test_progress_counts_every_step_and_can_end_it(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    steps: list[int] = []
    run(engine, vector, limits=SafeLimits(perplexity_ratio=1000, drop=1), progress=steps.append)
    assert sum(steps) == steps_of(PROMPTS, STRENGTHS)
    assert steps_of(PROMPTS, nulls=0) == 5 * 17
    assert steps_of(PROMPTS, nulls=3, shuffled=True) == 5 * 17 + 9 * 6

    class CancelledError(Exception):
        pass

    def cancel(done: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        run(engine, vector, progress=cancel)
    assert engine.stats().slots_in_use == 0


def test_without_a_scorer_only_the_kl_is_known(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    found = run(engine, vector, scorer=None, limits=SafeLimits(perplexity_ratio=1000))
    one = found.calibration
    assert (one.effect, one.scorer, one.linearity, one.monotonicity) == (None, None, None, None)
    assert found.auto is None
    assert one.doses[1].score is None
    assert len(one.kl) == len(one.doses)


def test_the_calibrated_use_becomes_the_default(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    where = Where(positions=((-1, None),))
    limits = SafeLimits(perplexity_ratio=1e9, drop=1)
    found = run(engine, vector, scorer=None, layers=[1], where=where, limits=limits)
    card = found.vector.card
    assert (card.default_layers, card.default_where) == ((1,), where)
    assert card.calibration is not None
    assert (card.calibration.layers, card.calibration.where) == ((1,), where)
    spec = {"interventions": [{"kind": "add", "vector": "e", "strength": {"kl": 0.001}}]}
    plan = plans_of(engine, MemoryLibrary({"e": found.vector})).plan(parse_spec(spec))
    assert [point.layer for point in plan.points] == [1]


def test_a_vector_that_does_nothing_has_no_effect(
    engine: TransformersEngine, vector: ControlVector
) -> None:
    with pytest.raises(SteerError, match="no effect") as caught:
        run(engine, vector, scorer=lambda _: Score(0.5), limits=SafeLimits(perplexity_ratio=1e9))
    assert caught.value.code == "no_effect"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"strengths": [-1.0, 1.0]}, "invalid_option"),
        ({"strengths": [0.0]}, "invalid_option"),
        ({"strengths": []}, "invalid_option"),
        ({"layers": [7]}, "layer_out_of_range"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    engine: TransformersEngine, vector: ControlVector, fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        run(engine, vector, **fields)
    assert caught.value.code == code
    with pytest.raises(SteerError) as caught:
        calibrate(engine, vector, [], letters)
    assert caught.value.code == "no_prompts"


def doses(*rows: Sequence[float]) -> list[MeasuredDose]:
    return [
        MeasuredDose(strength=n, score=score, valid=valid, perplexity_ratio=ratio, kl=0.0)
        for n, (score, valid, ratio) in enumerate(rows)
    ]


GOOD = ((0.0, 1.0, 1.0), (0.5, 0.9, 1.2), (0.9, 0.8, 1.5))


@pytest.mark.parametrize(
    ("bad", "safe"),
    [
        ((1.0, 1.0, 1.51), 3),
        ((1.0, 0.79, 1.0), 3),
        ((0.84, 1.0, 1.0), 3),
        ((0.86, 1.0, 1.0), 5),  # within the tolerance
        ((1.0, 0.8, 1.5), 5),  # on every limit
    ],
)
def test_the_range_ends_before_the_first_broken_limit(bad: tuple[float, ...], safe: int) -> None:
    assert calibrated_range(doses(*GOOD, bad, (1.0, 1.0, 1.0)), SafeLimits()) == safe


@pytest.mark.parametrize(
    "rows", [((0.0, 0.5, 1.0), (1.0, 1.0, 1.0)), ((0.5, 1.0, 1.0), (0.6, 1.0, 9.0))]
)
def test_no_range_is_an_error_that_says_why(rows: Any) -> None:
    with pytest.raises(SteerError, match=r"unsteered answers|strength 1") as caught:
        calibrated_range(doses(*rows), SafeLimits())
    assert caught.value.code == "no_safe_range"


def test_the_report_is_a_folder(found: CalibratedVector, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_calibration_report(folder, found, title="e: letters")
    figures = json.loads((folder / "report.json").read_text())
    assert figures["safe_strength"] == found.calibration.safe_strength
    assert figures["calibration"]["doses"][1]["strength"] == 0.02
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.md").read_text()
    assert page.startswith("# e: letters\n")
    assert page.count("\n| ") == (2 + 7) + (2 + 8)
    assert "Beside chance: it is above its nulls" in page
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerError, match="cannot be written"):
        write_calibration_report(tmp_path / "file" / "x", found, title="e")
