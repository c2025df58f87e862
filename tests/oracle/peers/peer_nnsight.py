"""nnsight: values assigned to module outputs inside a trace, and hidden states read there.

Runs in .venvs/peers. Writes the logits of every case, as `model/case`, and the
states after the last edited block.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from nnsight import NNsight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def traced(model: NNsight, tokens: torch.Tensor, rows: dict[str, torch.Tensor]) -> dict:
    """Each case by itself: nnsight reads a trace's own source, so that it cannot be a closure."""
    one, two = rows["layers.1"], rows["layers.2"]
    unit = two / two.norm()
    out = {}
    with torch.no_grad():
        with model.trace(tokens):
            model.model.layers[1].output[:] = model.model.layers[1].output + 1.5 * one
            model.model.layers[2].output[:] = model.model.layers[2].output + 1.5 * two
            states = model.model.layers[2].output.save()
            logits = model.lm_head.output.save()
        out["add"], out["add.states"] = logits, states
        with model.trace(tokens):
            stream = model.model.layers[2].output
            model.model.layers[2].output = stream - (stream @ unit)[..., None] * unit
            states = model.model.layers[2].output.save()
            logits = model.lm_head.output.save()
        out["ablate"], out["ablate.states"] = logits, states
        with model.trace(tokens):
            model.model.layers[1].output[:, 4] = one
            states = model.model.layers[2].output.save()
            logits = model.lm_head.output.save()
        out["patch"], out["patch.states"] = logits, states
        with model.trace(tokens):
            model.model.layers[2].mlp.output[:, -1:] += 2.0 * two
            states = model.model.layers[2].output.save()
            logits = model.lm_head.output.save()
        out["mlp-last"], out["mlp-last.states"] = logits, states
        with model.trace(tokens):
            model.model.layers[1].input[:] = model.model.layers[1].input + one
            states = model.model.layers[2].output.save()
            logits = model.lm_head.output.save()
        out["input"], out["input.states"] = logits, states
        with model.trace(tokens):
            stream = model.model.layers[2].output
            moved = stream + 0.5 * stream.norm(dim=-1, keepdim=True) * unit
            model.model.layers[2].output = moved
            states = model.model.layers[2].output.save()
            logits = model.lm_head.output.save()
        out["add-by-norm"], out["add-by-norm.states"] = logits, states
    return out


def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    out = {}
    for kind, path in options["models"].items():
        model = NNsight(AutoModelForCausalLM.from_pretrained(path).eval())
        results = traced(model, given["tokens"], given)
        out |= {f"{kind}/{name}": tensor for name, tensor in results.items()}
    save_file(
        {name: t.detach().clone().contiguous() for name, t in out.items()},
        folder / "outputs.safetensors",
    )


main(Path(sys.argv[1]))
