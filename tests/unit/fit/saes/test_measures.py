"""What an SAE is worth, and training on what the model predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from steer.artefacts.sae.base import SAE
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.bulk.capturing import BulkReading, capture_to
from steer.fit.bulk.shards import CapturedStates
from steer.fit.saes.measures import loss_recovered, measure
from steer.fit.saes.network import RowUnits, SAENetwork
from steer.fit.saes.options import SAEOptions
from steer.fit.saes.predictions import ModelPredictions
from steer.fit.saes.training import train_sae
from steer.model import HookPoint

POINT = HookPoint(1)
TEXTS = [tuple(65 + (start * n) % 26 for n in range(12 + start)) for start in range(1, 24)]


def whole_sae(width: int, share: float = 1.0) -> SAE:
    """Rebuilds `share` of a state: each channel has a feature for either sign."""
    eye = torch.eye(width)
    return SAE.of(
        "standard",
        W_enc=torch.cat([eye, -eye], 1),
        b_enc=torch.zeros(2 * width),
        W_dec=torch.cat([eye, -eye]) * share,
        b_dec=torch.zeros(width),
        layer=POINT.layer,
    )


def test_a_perfect_sae_explains_everything_and_half_of_one_half(
    lively: TransformersEngine,
) -> None:
    states = torch.cat(
        [one.states[POINT] for one in lively.capture(CaptureRequest(TEXTS, (POINT,)))]
    )
    mean = states.mean(0)
    perfect = measure(whole_sae(len(mean)), states)
    assert perfect.explained == pytest.approx(1.0, abs=1e-6)
    assert perfect.active == pytest.approx(len(mean), rel=1e-3)
    assert perfect.tokens == len(states)
    found = loss_recovered(lively, whole_sae(len(mean)), TEXTS, mean, skip=2)
    assert found.tokens == sum(len(text) - 3 for text in TEXTS)
    assert found.rebuilt == pytest.approx(found.own, abs=1e-4)
    assert found.recovered == pytest.approx(1.0, abs=1e-3)
    # The model's own loss is that of its logits.
    captured = lively.capture(CaptureRequest(TEXTS, logits="all"))
    total = sum(
        float(
            functional.cross_entropy(one.logits[2:-1], torch.tensor(text[3:]), reduction="sum")  # type: ignore[index]
        )
        for one, text in zip(captured, TEXTS, strict=True)
    )
    assert found.own == pytest.approx(total / found.tokens, abs=1e-4)
    last = loss_recovered(lively, whole_sae(len(mean)), TEXTS, mean, counted=[99, *[9] * 22])
    assert last.tokens == sum(len(text) - 9 for text in TEXTS[1:])
    half = measure(whole_sae(len(mean), 0.5), states)
    left = float((0.5 * states).square().sum() / (states - mean).square().sum())
    assert half.explained == pytest.approx(1 - left, abs=1e-5)


def test_gradients_are_those_of_the_divergence(lively: TransformersEngine) -> None:
    """`learn` goes down the divergence that it tells: a small step along the gradients it leaves
    lowers it as far as they say."""
    width = lively.info.d_model
    options = SAEOptions(
        latents=16, k=4, prediction_weight=1.0, prediction_texts=3, prediction_every=1
    )
    predictions = ModelPredictions(lively, POINT, TEXTS, options, skip=1)
    network, units = SAENetwork(width, options), RowUnits(torch.zeros(width), 1.0)
    before = predictions.learn(network, units, 0)
    assert network.decoder.grad is not None
    slope = float(network.decoder.grad.square().sum())
    step = 1e-2 / slope**0.5
    with torch.no_grad():
        network.decoder -= step * network.decoder.grad / slope**0.5
    after = predictions.learn(network, units, 0)
    assert after == pytest.approx(before - step * slope**0.5, rel=0.02)
    assert after < before
    # The next step takes the next texts.
    assert predictions.learn(network, units, 1) != pytest.approx(after, rel=1e-6)
    with pytest.raises(SteerError, match="nothing to predict"):
        ModelPredictions(lively, POINT, [(1, 2)], options, skip=1)


def test_training_on_predictions_brings_them_nearer(
    lively: TransformersEngine, tmp_path: Path
) -> None:
    """At few features on a token, what the model says on rebuilt states is nearer to its own with
    the term than without it."""
    capture_to(lively, TEXTS * 8, tmp_path / "states", BulkReading((POINT,), skip=1))
    states = CapturedStates.open(tmp_path / "states")

    def loss(weight: float) -> float:
        options = SAEOptions(
            latents=48,
            k=2,
            epochs=8.0,
            batch=128,
            rate=3e-3,
            prediction_weight=weight,
            prediction_every=2,
        )
        predictions = ModelPredictions(lively, POINT, TEXTS, options) if weight else None
        found = train_sae(
            [states], options, tmp_path / f"{weight}", name="p", predictions=predictions
        )
        worth = loss_recovered(lively, found.sae, TEXTS, found.sample.mean(0))
        return abs(worth.rebuilt - worth.own)

    assert loss(3.0) < loss(0.0)
