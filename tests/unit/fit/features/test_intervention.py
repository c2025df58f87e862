"""Intervention scores: how much likelier raising a feature makes its label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer.artefacts.sae.base import SAE
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.features.effect import EffectGround, EffectOptions, Raised
from steer.fit.features.intervention import (
    QUESTION,
    _label_logprobs,
    intervention_scores,
    intervention_steps,
    scored_gains,
)
from steer.fit.measure.nulls.matching import Match
from steer.prompts import as_chat, render

MATCHES = [Match(1.0, 0.3, 2, reached=True)] * 23


def test_own_labels_are_held_against_others_and_against_chance() -> None:
    gains = np.concatenate([np.eye(3) * 5 + 1, np.linspace(-1, 1, 60).reshape(20, 3)])
    found = scored_gains(Raised(3, MATCHES, []), [7, 8, 9], ["a", "b", "c"], gains)
    assert found.auroc == 1.0
    one = found.scores[7]
    assert (one.gain, one.shuffled, one.kl) == (6.0, 1.0, 0.3)
    assert one.p == pytest.approx(1 / 21)
    assert one.null_low is not None
    assert one.null_low < 0 < one.null_high


def test_labels_that_do_no_better_than_others_are_at_chance() -> None:
    gains = np.concatenate([np.ones((3, 3)), np.linspace(2, 3, 60).reshape(20, 3)])
    found = scored_gains(Raised(3, MATCHES, []), [7, 8, 9], ["a", "b", "c"], gains)
    assert found.auroc == 0.5
    assert found.scores[8].p == 1.0


def test_the_same_label_twice_is_no_other_label() -> None:
    found = scored_gains(Raised(2, MATCHES, []), [7, 8], ["a", "a"], np.ones((2, 2)))
    assert found.auroc is None
    assert found.scores[7].shuffled is None
    assert found.scores[7].p is None


def test_a_label_is_read_after_each_answer(lively: TransformersEngine) -> None:
    width = lively.info.d_model
    generator = torch.Generator().manual_seed(0)
    sae = SAE.of(
        "relu",
        W_enc=torch.randn(width, 30, generator=generator),
        W_dec=torch.randn(30, width, generator=generator),
        b_dec=torch.zeros(width),
        layer=1,
    )
    prompts = ["How are you?", "What is rain?"]
    ground = EffectGround.of(lively, sae, prompts, EffectOptions(kl=0.3, nulls=2, max_tokens=6))
    told: list[int] = []
    found = intervention_scores(ground, {1: "birds", 2: "rain"}, prompts, progress=told.append)
    assert sum(told) == intervention_steps(2, 4, 2)
    assert set(found.scores) == {1, 2}
    answers = ground.references.answers
    expected = 0.0
    for one in answers:
        asked = as_chat(lively.tokenizer, QUESTION.format(text=one.text))
        head = list(render(lively.tokenizer, asked))
        tail = list(lively.tokenizer.encode("rain", add_special_tokens=False))
        [read] = lively.capture(CaptureRequest([head + tail], logits="all"))
        assert read.logits is not None
        chances = read.logits[len(head) - 1 : -1].double().log_softmax(-1)
        expected += float(chances[torch.arange(len(tail)), tail].sum()) / len(answers)
    [rain] = _label_logprobs(lively, answers, ["rain"])
    assert rain == pytest.approx(expected, abs=1e-3)
