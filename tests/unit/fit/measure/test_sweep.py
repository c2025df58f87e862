"""Dose-response on a small model whose answers a vector can force."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.measure.plot import plot_dose_response
from steer.fit.measure.scoring import Score, regex_scorer
from steer.fit.measure.sweep import DoseResponse, dose_response
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

PROMPTS = ["one", "two words", "and three more"]
SAMPLING = SamplingParams(max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def cache(engine: TransformersEngine) -> PlanCache:
    # The output row of "e": far along it, every answer is made of that letter.
    row = engine._hooked.model.get_output_embeddings().weight[ord("e")].detach()  # type: ignore[index]
    vector = ControlVector.of({2: row / row.norm()}, name="e")
    return PlanCache(MemoryLibrary({"e": vector}), engine.info, engine.capabilities)


def plan_at(cache: PlanCache, strength: float) -> SteeringPlan:
    return cache.plan(
        parse_spec({"interventions": [{"kind": "add", "vector": "e", "strength": strength}]})
    )


@pytest.fixture(scope="module")
def response(engine: TransformersEngine, cache: PlanCache) -> DoseResponse:
    return dose_response(
        engine,
        PROMPTS,
        lambda strength: plan_at(cache, strength),
        [0.0, 50.0],
        regex_scorer("^e{6}$"),
        sampling=SAMPLING,
        examples=2,
    )


def test_the_score_follows_the_dose(response: DoseResponse) -> None:
    assert response.unsteered.score == 0
    assert [dose.measured.score for dose in response.doses] == [0, 1]
    assert response.doses[1].measured.examples == ("eeeeee", "eeeeee")
    assert response.unsteered.valid is None


def test_no_dose_is_the_unsteered_model(response: DoseResponse) -> None:
    assert response.doses[0].measured == response.unsteered
    assert response.doses[0].perplexity_ratio == 1


def test_the_loss_is_the_mean_over_all_tokens(
    engine: TransformersEngine, cache: PlanCache, response: DoseResponse
) -> None:
    requests = [
        GenerationRequest(str(n), tuple(engine.tokenizer.encode(p)), SAMPLING, plan_at(cache, 50.0))
        for n, p in enumerate(PROMPTS)
    ]
    chosen = [x.logprob for one in engine.complete(requests) for x in one.logprobs]
    assert len(chosen) == 18
    dose = response.doses[1]
    assert dose.measured.loss == pytest.approx(-sum(chosen) / 18, abs=1e-4)
    ratio = math.exp(dose.measured.loss - response.unsteered.loss)
    assert dose.perplexity_ratio == pytest.approx(ratio)


def test_validity_and_both(engine: TransformersEngine, cache: PlanCache) -> None:
    seen: list[int] = []
    answer = dose_response(
        engine,
        PROMPTS,
        lambda strength: plan_at(cache, strength),
        [50.0],
        lambda text: Score(0.5, valid=text == "eeeeee"),
        sampling=SAMPLING,
        progress=seen.append,
    )
    assert (answer.unsteered.valid, answer.unsteered.both) == (0, 0)
    assert (answer.doses[0].measured.valid, answer.doses[0].measured.both) == (1, 0.5)
    assert sum(seen) == 2 * len(PROMPTS)


def test_figures_for_machines_and_people(response: DoseResponse, tmp_path: Path) -> None:
    read = json.loads(json.dumps(response.as_json()))
    assert read["doses"][1]["strength"] == 50
    assert read["doses"][1]["score"] == 1
    assert read["unsteered"]["answers"] == 3
    plot_dose_response(response, tmp_path / "plot.png", title="e")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SteerError, match="cannot be written"):
        plot_dose_response(response, tmp_path / "no" / "plot.png", title="e")
