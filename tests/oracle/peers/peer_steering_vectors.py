"""steering-vectors: `SteeringVector.apply` with its operators, layer types and token choices.

Runs in .venvs/peers. Writes the logits of every case, as `model/case`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from steering_vectors import SteeringVector, ablation_operator, ablation_then_addition_operator
from transformers import AutoModelForCausalLM

ROWS = {1: "layers.1", 2: "layers.2"}


@torch.no_grad()
def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    rows = {layer: given[name] for layer, name in ROWS.items()}
    out = {}
    cases = {
        "add": ("decoder_block", {"multiplier": 1.5}),
        "add-negative": ("decoder_block", {"multiplier": -0.4}),
        "add-from-3": ("decoder_block", {"min_token_index": 3}),
        "add-at-1-and-4": ("decoder_block", {"min_token_index": None, "token_indices": [1, 4]}),
        "add-mlp": ("mlp", {"multiplier": 2.0}),
        "add-attention": ("self_attn", {"multiplier": 2.0}),
        "ablate": ("decoder_block", {"operator": ablation_operator()}),
        "ablate-add": ("decoder_block", {"operator": ablation_then_addition_operator()}),
    }
    for kind, path in options["models"].items():
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        out[f"{kind}/plain"] = model(given["tokens"]).logits
        for name, (layer_type, how) in cases.items():
            with SteeringVector(dict(rows), layer_type).apply(model, **how):
                out[f"{kind}/{name}"] = model(given["tokens"]).logits
    save_file({name: t.contiguous() for name, t in out.items()}, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
