"""The files that steering-vectors and tuned-lens write, and what the lens says.

Runs in .venvs/peers. Writes pickled vectors of every layer type, by pickle.dump and by torch.save,
and a tuned lens under `options["folder"]`; and as outputs the lens's logits for the hidden states
of `options["model"]`, as `lens.N` for translator N, with those states as `state.N`.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM
from tuned_lens.nn.lenses import TunedLens

LAYER_TYPES = ("decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


@torch.no_grad()
def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    target = Path(options["folder"])
    rows = {layer: given[f"layers.{layer}"] for layer in (1, 2)}
    for layer_type in LAYER_TYPES:
        vector = SteeringVector(rows, layer_type)
        (target / f"{layer_type}.pkl").write_bytes(pickle.dumps(vector))
        torch.save(vector, target / f"{layer_type}.pt")
    model = AutoModelForCausalLM.from_pretrained(options["model"]).eval()
    lens = TunedLens.from_model(model)
    generator = torch.Generator().manual_seed(3)
    for translator in lens:
        translator.weight.copy_(0.1 * torch.randn(translator.weight.shape, generator=generator))
        translator.bias.copy_(torch.randn(translator.bias.shape, generator=generator))
    lens.save(target / "lens")
    out = {}
    states = model(given["tokens"][:1], output_hidden_states=True).hidden_states
    for index in range(len(lens)):
        out[f"state.{index}"] = states[index][0]
        out[f"lens.{index}"] = lens(states[index][0], index)
    out["plain"] = model(given["tokens"][:1]).logits[0]
    save_file({name: t.contiguous() for name, t in out.items()}, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
