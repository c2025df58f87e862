"""dictionary_learning and sparsify: SAEs that they trained or drew, saved and run by themselves.

Runs in .venvs/dictionaries. Each case is a folder below `options["saves"]`, as the package writes
it, with the outputs `case.features` and `case.decoded` of what the package then loads from there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from dictionary_learning import training
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

STEPS, LATENTS, K = 30, 64, 8
COMPETING = {"k": K, "warmup_steps": 2, "threshold_start_step": 3}
PENALISED = {"lr": 1e-2, "warmup_steps": 2, "sparsity_warmup_steps": 2}
TRAINERS: dict[str, tuple[type, dict[str, Any]]] = {
    "AutoEncoder": (StandardTrainer, PENALISED),
    "AutoEncoder-April": (StandardTrainerAprilUpdate, PENALISED),
    "GatedAutoEncoder": (GatedSAETrainer, PENALISED),
    "JumpReluAutoEncoder": (JumpReluTrainer, PENALISED | {"bandwidth": 0.5}),
    "AutoEncoderTopK": (TopKTrainer, COMPETING),
    "BatchTopKSAE": (BatchTopKTrainer, COMPETING),
    "MatryoshkaBatchTopKSAE": (
        MatryoshkaBatchTopKTrainer,
        COMPETING | {"group_fractions": [0.25, 0.75]},
    ),
}
SPARSE_CODERS = {
    "topk/layers.1": {"activation": "topk"},
    "groupmax/layers.1": {"activation": "groupmax"},
    "transcoder/layers.1.mlp": {"activation": "topk", "transcode": True},
    "skip_transcoder/layers.1.mlp": {
        "activation": "topk",
        "transcode": True,
        "skip_connection": True,
    },
}


def trained(folder: Path, x: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """A few steps of each trainer on batches about `x`, saved by the package's own training."""
    about = {"layer": layer, "lm_name": "tiny", "submodule_name": f"resid_post_layer_{layer}"}
    shape = {"activation_dim": x.shape[-1], "dict_size": LATENTS, "steps": STEPS}
    configs = [
        {"trainer": kind, "device": "cpu", "seed": seed, **about, **shape, **more}
        for seed, (kind, more) in enumerate(TRAINERS.values())
    ]
    generator = torch.Generator().manual_seed(3)
    data = [x + 0.5 * torch.randn(x.shape, generator=generator) for _ in range(STEPS)]
    training.trainSAE(data, configs, STEPS, save_dir=str(folder), device="cpu")
    out = {}
    for place, name in enumerate(TRAINERS):
        saved = folder / f"trainer_{place}"
        told = json.loads((saved / "config.json").read_text())["trainer"]
        assert told["dict_class"] == name.split("-")[0], told["dict_class"]
        dictionary, _ = load_dictionary(str(saved), device="cpu")
        saved.rename(folder / name)
        with torch.no_grad():
            features = dictionary.encode(x)
            out |= {f"{name}.features": features, f"{name}.decoded": dictionary.decode(features)}
    return out


@torch.no_grad()
def drawn(folder: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sparse coders of random weights."""
    out = {}
    for seed, (name, config) in enumerate(SPARSE_CODERS.items()):
        coder = SparseCoder(x.shape[-1], SparseCoderConfig(num_latents=LATENTS, k=K, **config))
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(coder.named_parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        coder.save_to_disk(folder / name)
        loaded = SparseCoder.load_from_disk(folder / name)
        found = loaded.encode(x)
        features = torch.zeros(len(x), LATENTS)
        features.scatter_(1, found.top_indices, found.top_acts)
        out |= {f"{name}.features": features, f"{name}.decoded": loaded(x, x).sae_out}
    return out


def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    x = load_file(folder / "inputs.safetensors")["x"]
    saves = Path(options["saves"])
    out = trained(saves, x, options["layer"]) | drawn(saves, x)
    save_file({name: one.contiguous() for name, one in out.items()}, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
