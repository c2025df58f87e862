"""A vector as a scorer, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.base import CaptureRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.measure.answers import answers_under
from steer.fit.measure.probe import ProbeScorer
from steer.model import HookPoint

MEASURE = LayerMeasure(separation=2.0, positive=0.3, negative=-0.1)


def probe_vector(**card: object) -> ControlVector:
    generator = torch.Generator().manual_seed(3)
    return ControlVector.of({1: 5 * torch.randn(32, generator=generator)}, name="p", **card)


def projections(engine: TransformersEngine, vector: ControlVector) -> list[float]:
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        [read] = engine.capture(CaptureRequest([prompt + answer], (HookPoint(1),)))
        states = read.states[HookPoint(1)].double().numpy()[len(prompt) :]
        row = vector[1].double().numpy()
        found.append(float(states.mean(0) @ row / np.linalg.norm(row)))
    return found


PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
ANSWERS = [[10, 11], [12, 13, 14, 15], [16]]


def test_the_probability_of_two_normal_classes(engine: TransformersEngine) -> None:
    vector = probe_vector(measures={1: MEASURE})
    scores = ProbeScorer.of(vector).score(engine, PROMPTS, ANSWERS, ["", "", ""])
    # log N(x; .3, s²) − log N(x; −.1, s²), with s = gap / d′ = .2
    x = np.array(projections(engine, vector))
    logit = ((x + 0.1) ** 2 - (x - 0.3) ** 2) / (2 * 0.2**2)
    assert [s.value for s in scores] == pytest.approx((1 / (1 + np.exp(-logit))).tolist(), abs=1e-5)


def test_a_threshold_decides(engine: TransformersEngine) -> None:
    vector = probe_vector()
    values = projections(engine, vector)
    middle = sorted(values)[1]
    scores = ProbeScorer.of(vector, threshold=middle - 1e-4).score(engine, PROMPTS, ANSWERS, [""])
    assert [s.value for s in scores] == [float(x >= middle) for x in values]


def test_no_answer_is_not_judged(engine: TransformersEngine) -> None:
    probe = ProbeScorer.of(probe_vector(), threshold=0.0)
    scores = probe.score(engine, [[1, 2], [3]], [[], [4]], ["", "x"])
    assert [score.judged for score in scores] == [False, True]


def test_it_scores_answers_in_place(engine: TransformersEngine) -> None:
    vector = probe_vector(measures={1: MEASURE})
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=0, ignore_eos=True)
    probe = ProbeScorer.of(vector)
    prompts = ["a", "bc", "a"]
    [answers] = answers_under(engine, [prompts], [None], probe, sampling=sampling)
    assert answers[0].score == answers[2].score
    alone = probe.score(engine, [answers[1].prompt], [answers[1].tokens], [answers[1].text])
    assert alone[0].value == pytest.approx(answers[1].score.value, abs=1e-5)


def test_without_measures_a_threshold_is_needed() -> None:
    with pytest.raises(SteerError, match="no class means for layer 1") as caught:
        ProbeScorer.of(probe_vector())
    assert caught.value.code == "not_measured"
    with pytest.raises(SteerError) as caught:
        ProbeScorer.of(probe_vector(), layer=2, threshold=0.0)
    assert caught.value.code == "layer_not_in_vector"
