"""Random adapters (LoRA) for the demo model in the files that `peft` writes, and the model with one
of them in its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

RANK, ALPHA = 4, 8
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: Path, *, seed: int) -> Path:
    """An adapter of every linear layer of `model`, large enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _linear(model).items():
        a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        b = torch.randn(weight.shape[0], RANK, generator=generator) * weight.float().std()
        path = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [*_ATTENTION, *_MLP],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_merged(folder: Path, model: Path, adapter: Path) -> Path:
    """`model` with `adapter` added to its weights, in float32."""
    shutil.copytree(model, folder)
    low_rank = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    weights = safetensors.torch.load_file(model / "model.safetensors")
    merged = {name: weight.float() for name, weight in weights.items()}
    for name in _linear(model):
        path = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (low_rank[f"{path}.lora_{side}.weight"] for side in "AB")
        merged[name] += ALPHA / RANK * b @ a
    safetensors.torch.save_file(merged, folder / "model.safetensors", {"format": "pt"})
    return folder


def _linear(model: Path) -> dict[str, Tensor]:
    weights = safetensors.torch.load_file(model / "model.safetensors")
    ends = tuple(f".{one}.weight" for one in (*_ATTENTION, *_MLP))
    return {name: weight for name, weight in sorted(weights.items()) if name.endswith(ends)}
