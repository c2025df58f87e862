"""repeng: `ControlModel.set_control`, and the GGUF files it writes and reads.

Runs in .venvs/repeng. Writes the logits of every case as `model/case`,
`options["export"]` as GGUF, and the rows it reads from `options["ours"]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from repeng import ControlModel, ControlVector
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    out = {}
    rows = {layer: given[f"layers.{layer}"].numpy() for layer in (1, 2)}
    vector = ControlVector(model_type="llama", directions=rows)
    cases = {
        "add": (1.5, {}),
        "subtract": (-0.5, {}),
        "add-preserving-norm": (1.5, {"normalize": True}),
    }
    # One prompt at a time: its padding mask expects a row of positions for each.
    prompts = given["tokens"].split(1)
    for kind, path in options["models"].items():
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        out[f"{kind}/plain"] = model(given["tokens"]).logits
        controlled = ControlModel(model, [1, 2])
        for name, (strength, how) in cases.items():
            controlled.set_control(vector, strength, **how)
            out[f"{kind}/{name}"] = torch.cat([controlled(one).logits for one in prompts])
    vector.export_gguf(options["export"])
    for layer, row in ControlVector.import_gguf(options["ours"]).directions.items():
        out[f"read.{layer}"] = torch.from_numpy(np.array(row))
    save_file({name: t.contiguous() for name, t in out.items()}, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
