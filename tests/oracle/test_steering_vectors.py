"""Steered logits against steering-vectors, on three architectures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer
from steer import ControlVector

pytestmark = pytest.mark.slow

MODELS = ["llama", "qwen2", "gpt2"]

ADD = {"kind": "add", "vector": "v"}
CASES: dict[str, list[dict[str, Any]]] = {
    "add": [ADD | {"strength": 1.5}],
    "add-negative": [ADD | {"strength": -0.4}],
    "add-from-3": [ADD | {"where": {"positions": [[3, None]]}}],
    "add-at-1-and-4": [ADD | {"where": {"positions": [[1, 2], [4, 5]]}}],
    "add-mlp": [ADD | {"strength": 2.0, "site": "mlp_out"}],
    "add-attention": [ADD | {"strength": 2.0, "site": "attn_out"}],
    "ablate": [{"kind": "ablate", "vector": "v"}],
    "ablate-add": [{"kind": "ablate", "vector": "v"}, ADD],
}


@pytest.fixture(scope="module")
def theirs(run_peer: Any, tiny_models: Mapping[str, Path], inputs: Any) -> Any:
    models = {name: tiny_models[name] for name in MODELS}
    return run_peer("peers", "peer_steering_vectors.py", inputs, models=models)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any, theirs: Any, tiny_models: Mapping[str, Path]) -> Any:
    """The model, and the peer's results on it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[request.param]).eval()
    start = f"{request.param}/"
    return model, {k.removeprefix(start): v for k, v in theirs.items() if k.startswith(start)}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_the_same(pair, inputs, name):
    model, theirs = pair
    vector = ControlVector.of({1: inputs["layers.1"], 2: inputs["layers.2"]})

    with (
        torch.no_grad(),
        steer.attach(model, {"interventions": CASES[name]}, vectors={"v": vector}),
    ):
        logits = model(inputs["tokens"]).logits

    torch.testing.assert_close(logits, theirs[name], atol=1e-5, rtol=1e-5)
    assert (theirs[name] - theirs["plain"]).abs().max() > 0.1


def test_the_plain_logits_are_the_same(pair, inputs):
    model, theirs = pair
    with torch.no_grad():
        assert torch.equal(model(inputs["tokens"]).logits, theirs["plain"])
