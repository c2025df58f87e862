"""Models that draft for the demo model, on disk: random and small, as vLLM reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm_speculation import DRAFTS


def demo_config(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "config.json").read_text())
    return found


def write_eagle(folder: Path, model: Path) -> None:
    """EAGLE: one layer over the target's last state and the next token's embedding. The target's
    embedding and output matrix are its own as well."""
    config = demo_config(model)
    d = config["hidden_size"]
    weights = {"fc.weight": _random(d, 2 * d), **_layer("layers.0.", config, inputs=d)}
    del weights["layers.0.input_layernorm.weight"]
    _write(folder, {**config, "num_hidden_layers": 1}, weights)


def drafters(folder: Path, model: Path) -> dict[str, dict[str, Any]]:
    """A `speculative_config` for each method with a model, which may lie in `folder`."""
    write_eagle(folder / "eagle", model)
    models = {"eagle": folder / "eagle", "draft_model": model}
    return {
        name: {"method": name, "model": str(path), "num_speculative_tokens": DRAFTS}
        for name, path in models.items()
    }


def _layer(prefix: str, config: dict[str, Any], *, inputs: int) -> dict[str, Tensor]:
    """The weights of a Llama layer whose attention reads `inputs` numbers of a token."""
    d, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {
        "self_attn.q_proj": (queries, inputs),
        "self_attn.k_proj": (keys, inputs),
        "self_attn.v_proj": (keys, inputs),
        "self_attn.o_proj": (d, queries),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return {
        **{f"{prefix}{name}.weight": _random(*shape) for name, shape in shapes.items()},
        **{f"{prefix}{name}.weight": torch.ones(d) for name in norms},
    }


_generator = torch.Generator().manual_seed(17)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator) / shape[-1] ** 0.5


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(weights, folder / "model.safetensors")
