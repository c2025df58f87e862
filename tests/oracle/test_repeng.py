"""Steered logits against repeng's `ControlModel`, and GGUF files in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer
from steer import ControlVector
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import read_gguf, write_gguf

pytestmark = pytest.mark.slow

MODELS = ["llama", "qwen2", "gpt2"]

CASES: dict[str, dict[str, Any]] = {
    "add": {"interventions": [{"kind": "add", "vector": "v", "strength": 1.5}]},
    "subtract": {"interventions": [{"kind": "add", "vector": "v", "strength": -0.5}]},
    "add-preserving-norm": {
        "interventions": [{"kind": "add", "vector": "v", "strength": 1.5}],
        "norm": "preserve",
    },
}


@pytest.fixture(scope="module")
def vector(inputs: Any) -> ControlVector:
    return ControlVector.of({1: inputs["layers.1"], 2: inputs["layers.2"]}, model="llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vector: ControlVector) -> Path:
    """Holds our GGUF file, and repeng's once it has run."""
    root = tmp_path_factory.mktemp("gguf")
    write_gguf(vector, root / "ours.gguf")
    return root


@pytest.fixture(scope="module")
def theirs(run_peer: Any, tiny_models: Mapping[str, Path], inputs: Any, folder: Path) -> Any:
    return run_peer(
        "repeng",
        "peer_repeng.py",
        inputs,
        models={name: tiny_models[name] for name in MODELS},
        export=folder / "theirs.gguf",
        ours=folder / "ours.gguf",
    )


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any, theirs: Any, tiny_models: Mapping[str, Path]) -> Any:
    """The model, and the peer's results on it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[request.param]).eval()
    start = f"{request.param}/"
    return model, {k.removeprefix(start): v for k, v in theirs.items() if k.startswith(start)}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_the_same(pair, inputs, vector, name):
    model, theirs = pair
    with torch.no_grad(), steer.attach(model, CASES[name], vectors={"v": vector}):
        logits = model(inputs["tokens"]).logits
    torch.testing.assert_close(logits, theirs[name], atol=1e-5, rtol=1e-5)
    assert (theirs[name] - theirs["plain"]).abs().max() > 0.1


def test_it_reads_the_gguf_we_write(theirs, vector):
    read = {int(name.removeprefix("read.")) for name in theirs if name.startswith("read.")}
    assert read == {1, 2}
    for layer in read:
        assert torch.equal(theirs[f"read.{layer}"], vector[layer])


def test_we_read_the_gguf_it_writes(theirs, vector, folder):
    ours = read_gguf(folder / "theirs.gguf", ImportOptions())
    assert ours.card.layers == (1, 2)
    for layer in (1, 2):
        assert torch.equal(ours[layer], vector[layer])
