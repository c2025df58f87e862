"""Steered logits and hidden states against nnsight, where each edit is written out as code."""

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

MODELS = ["llama", "qwen2"]

CASES: dict[str, dict[str, Any]] = {
    "add": {"kind": "add", "vector": "v", "strength": 1.5},
    "ablate": {"kind": "ablate", "vector": "v", "layers": [2]},
    "patch": {"kind": "patch", "vector": "v", "layers": [1], "where": {"positions": [[4, 5]]}},
    "mlp-last": {
        "kind": "add",
        "vector": "v",
        "strength": 2.0,
        "layers": [2],
        "site": "mlp_out",
        "where": {"positions": [[-1, None]]},
    },
    "input": {"kind": "add", "vector": "v", "layers": [1], "site": "resid_pre"},
    "add-by-norm": {"kind": "add", "vector": "v", "layers": [2], "strength": {"norm": 0.5}},
}


@pytest.fixture(scope="module")
def theirs(run_peer: Any, tiny_models: Mapping[str, Path], inputs: Any) -> Any:
    models = {name: tiny_models[name] for name in MODELS}
    return run_peer("peers", "peer_nnsight.py", inputs, models=models)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any, theirs: Any, tiny_models: Mapping[str, Path]) -> Any:
    """The model, and the peer's results on it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[request.param]).eval()
    start = f"{request.param}/"
    return model, {k.removeprefix(start): v for k, v in theirs.items() if k.startswith(start)}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_states_are_the_same(pair, inputs, name):
    model, theirs = pair
    vector = ControlVector.of({1: inputs["layers.1"], 2: inputs["layers.2"]})
    seen = []

    with (
        torch.no_grad(),
        steer.attach(model, {"interventions": [CASES[name]]}, vectors={"v": vector}),
    ):
        reader = model.model.layers[3].register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].clone())
        )
        logits = model(inputs["tokens"]).logits
        reader.remove()

    torch.testing.assert_close(logits, theirs[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0], theirs[f"{name}.states"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (model(inputs["tokens"]).logits - logits).abs().max() > 0.05
