"""Models that draft, on disk: random and small, as vLLM reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM
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


def write_eagle3(folder: Path, model: Path) -> None:
    """EAGLE-3: one layer over states of three layers of the target, with an output matrix of its
    own; the target's embedding is its own as well.

    The layers have to be named: those that vLLM chooses for itself (2, the middle one, and the last
    but two) are only two of a target of six, and no file fits these.
    """
    config = demo_config(model)
    d = config["hidden_size"]
    weights = {
        "fc.weight": _random(d, 3 * d),
        "norm.weight": torch.ones(d),
        "lm_head.weight": _random(config["vocab_size"], d),
        "midlayer.hidden_norm.weight": torch.ones(d),
        **_layer("midlayer.", config, inputs=2 * d),
    }
    fields = {
        "num_hidden_layers": 1,
        "draft_vocab_size": config["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
    }
    _write(folder, {**config, **fields, "tie_word_embeddings": False}, weights)


def write_medusa(folder: Path, model: Path) -> None:
    """Medusa: a block and an output matrix over the target's last state for each draft."""
    config = demo_config(model)
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    weights = {}
    for n in range(DRAFTS):
        weights[f"blocks.{n}.layers.0.weight"] = _random(d, d)
        weights[f"lm_heads.{n}.weight"] = _random(vocabulary, d)
    fields = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": DRAFTS}
    shape = {"hidden_size": d, "num_hidden_layers": 1, "vocab_size": vocabulary}
    _write(folder, {**fields, **shape}, weights)


def write_mtp(folder: Path, model: Path) -> None:
    """A random GLM-4-MoE of the shape of `model`, whose last layer stands in it a second time, as
    the one that predicts the next token but one."""
    demo = demo_config(model)
    d, layers = demo["hidden_size"], demo["num_hidden_layers"]
    torch.manual_seed(29)
    target = Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **{name: demo[name] for name in _SHAPE},
            initializer_range=0.1,
            moe_intermediate_size=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=layers - 1,
            num_nextn_predict_layers=1,
            tie_word_embeddings=False,
        )
    )
    target.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    last, own = (f"model.layers.{n}." for n in (layers - 1, layers))
    found = load_file(folder / "model.safetensors")
    weights = {
        **found,
        **{name.replace(last, own): one.clone() for name, one in found.items() if last in name},
        **{f"{own}{name}.weight": torch.ones(d) for name in ("enorm", "hnorm", "shared_head.norm")},
        f"{own}eh_proj.weight": _random(d, 2 * d),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Drafter:
    """The folder of a target, the `speculative_config` of what drafts for it, and its class."""

    target: Path
    config: dict[str, Any]
    model: str | None


def drafters(folder: Path, model: Path) -> dict[str, Drafter]:
    """One for each method with a model, which may lie in `folder`."""
    write_eagle(folder / "eagle", model)
    write_eagle3(folder / "eagle3", model)
    write_medusa(folder / "medusa", model)
    write_mtp(folder / "mtp", model)
    models = {
        "eagle": (folder / "eagle", "EagleLlamaForCausalLM"),
        "eagle3": (folder / "eagle3", "Eagle3LlamaForCausalLM"),
        "draft_model": (model, "LlamaForCausalLM"),
        "medusa": (folder / "medusa", "Medusa"),
    }
    found = {
        name: Drafter(model, {"method": name, "model": str(path), **_AT_ONCE}, made)
        for name, (path, made) in models.items()
    }
    found["mtp"] = Drafter(folder / "mtp", {"method": "mtp", **_AT_ONCE}, "Glm4MoeMTP")
    return found


_AT_ONCE = {"num_speculative_tokens": DRAFTS}


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
