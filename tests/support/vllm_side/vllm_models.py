"""Random three-layer models of the architectures that the vLLM engine steers, as folders.

Only transformers is needed to write them; vLLM loads them from the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import LAYERS, VOCABULARY
from transformers import PreTrainedModel

from steer.spec import Site

WIDTH = 128
"""Four heads of 32: the smallest that vLLM's attention on a CPU takes."""

ENDS: tuple[Site, ...] = ("resid_pre", "resid_post")
ALL: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 32}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, a small configuration of it, and the sites that are exact in vLLM.

    `layer` is the class of its layers in vLLM, where a test names it; `tolerance` is how far the
    two engines may lie apart, as a share of the largest value.
    """

    model: str
    config: str
    options: dict[str, Any]
    sites: tuple[Site, ...] = ALL
    layer: str = ""
    tolerance: float = 1e-4

    def build(self) -> PreTrainedModel:
        """The same weights each time."""
        torch.manual_seed(7)
        config = getattr(transformers, self.config)(**self.options)
        model: PreTrainedModel = getattr(transformers, self.model)(config)
        # The only one that caps attention scores, as Gemma 2 needs it.
        model.set_attn_implementation("eager")
        return model.eval()


def _causal(name: str, options: dict[str, Any], config: str = "", **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", config or f"{name}Config", options, **more)


ARCHITECTURES: dict[str, Architecture] = {
    # One tensor for what the last part added, one for all before it.
    "llama": _causal("Llama", _GROUPED),
    "mistral": _causal("Mistral", _HEADS),
    "phi3": _causal("Phi3", _GROUPED),
    "qwen2": _causal("Qwen2", _GROUPED),
    "qwen3": _causal("Qwen3", _HEADS),
    "gemma": _causal("Gemma", _HEADS),
    "gemma2": _causal("Gemma2", {**_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": _causal("Gemma3", {**_HEADS, "sliding_window": 8}, config="Gemma3TextConfig"),
    "glm4": _causal("Glm4", _HEADS),
    "nemotron": _causal("Nemotron", _HEADS),
    "apertus": _causal("Apertus", _GROUPED),
    "ernie45": _causal("Ernie4_5", _HEADS),
    # The same with mixtures of experts.
    "mixtral": _causal("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": _causal(
        "Qwen2Moe", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 64}
    ),
    "qwen3-moe": _causal("Qwen3Moe", {**_HEADS, **_EXPERTS}),
    "olmoe": _causal("Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "glm4-moe": _causal(
        "Glm4Moe",
        {
            **_HEADS,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "ernie45-moe": _causal(
        "Ernie4_5_Moe",
        {**_GROUPED, "moe_intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2},
    ),
    "gpt-oss": _causal("GptOss", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # One tensor, to which attention and then the MLP are added.
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", _GPT),
    "opt": _causal("OPT", {**_SHAPE, "ffn_dim": 160, "word_embed_proj_dim": WIDTH}),
    # vLLM computes the GELU itself, transformers an approximation of it.
    "bloom": _causal("Bloom", {**_GPT, "hidden_size": WIDTH}, tolerance=1e-3),
    "stablelm": _causal("StableLm", _GROUPED),
    "exaone4": _causal("Exaone4", {**_HEADS, "sliding_window": 8}),
    # Scaled or parallel parts.
    "granite": _causal(
        "Granite",
        {
            **_GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
        sites=ENDS,
    ),
    "granite-moe": _causal(
        "GraniteMoe",
        {
            **_GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        sites=ENDS,
    ),
    "granite-moe-shared": _causal(
        "GraniteMoeShared",
        {
            **_GROUPED,
            "residual_multiplier": 0.5,
            "shared_intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        sites=ENDS,
    ),
    "gpt-j": _causal("GPTJ", {**_GPT, "rotary_dim": 16}, sites=ENDS),
    "falcon": _causal("Falcon", _SHAPE, sites=ENDS),
    "cohere": _causal("Cohere", {**_GROUPED, "logit_scale": 0.25}, sites=ENDS),
    "cohere2": _causal("Cohere2", {**_GROUPED, "sliding_window": 8}, sites=ENDS),
    # Served through vLLM's backend for models of transformers.
    "olmo": _causal("Olmo", _GROUPED),
    "olmo2": _causal("Olmo2", _GROUPED),
    "olmo3": _causal("Olmo3", {**_GROUPED, "sliding_window": 8}),
    "starcoder2": _causal("Starcoder2", _GROUPED),
    "smollm3": _causal("SmolLM3", _GROUPED),
    "seed-oss": _causal("SeedOss", _HEADS),
    "glm": _causal("Glm", _HEADS),
    "arcee": _causal("Arcee", _HEADS),
    "cwm": _causal("Cwm", {**_HEADS, "sliding_window": 8}),
    "neox": _causal("GPTNeoX", {**_SHAPE, "use_parallel_residual": False}),
    "neox-parallel": _causal("GPTNeoX", {**_SHAPE, "use_parallel_residual": True}, sites=ENDS),
    "phi": _causal("Phi", _GROUPED, sites=ENDS),
}

REFUSED: dict[str, Architecture] = {
    # Every layer scales the stream after its MLP.
    "gemma4": _causal(
        "Gemma4",
        {
            **_HEADS,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        config="Gemma4TextConfig",
        layer="Gemma4DecoderLayer",
    ),
}


def write(architecture: Architecture, folder: Path) -> PreTrainedModel:
    """Saves the model to `folder` and returns it."""
    model = architecture.build()
    model.save_pretrained(folder)
    return model
