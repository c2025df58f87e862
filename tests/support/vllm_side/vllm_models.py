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

from steer.model import SITE_ORDER
from steer.spec import Site

WIDTH = 128
"""Four heads of 32: the smallest that vLLM's attention on a CPU takes."""

ENDS: tuple[Site, ...] = ("resid_pre", "resid_post")
ALL: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
INSIDE: tuple[Site, ...] = ("attn_in", "head_out", "mlp_in", "mlp_act")
PROJECTIONS: tuple[Site, ...] = ("head_out", "mlp_act")
"""Without a norm that attention alone, or the MLP alone, reads."""
EXPERTS: tuple[Site, ...] = ("attn_in", "head_out", "mlp_in")
"""An MLP of experts has no one place for its neurons."""

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

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_STATE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "state_size": 16,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, a small configuration of it, and the sites that are exact in vLLM:
    those of the `stream`, and those `inside` attention and MLP.

    `layer` is the class of its layers in vLLM, where a test names it; `tolerance` is how far the
    two engines may lie apart, as a share of the largest value. `alike` is False where vLLM by
    itself computes another thing than transformers of so small a model.
    """

    model: str
    config: str
    options: dict[str, Any]
    stream: tuple[Site, ...] = ALL
    inside: tuple[Site, ...] = INSIDE
    layer: str = ""
    tolerance: float = 1e-4
    alike: bool = True

    @property
    def sites(self) -> tuple[Site, ...]:
        """All of them, in forward order."""
        return tuple(sorted((*self.stream, *self.inside), key=SITE_ORDER.__getitem__))

    @property
    def widths(self) -> dict[str, int]:
        """Of rows inside attention and MLP, as `ModelInfo` has them."""
        options = self.options.get("text_config", self.options)
        d_mlp = options.get("intermediate_size") or options.get("ffn_dim") or 4 * WIDTH
        return {"d_mlp": d_mlp, "n_heads": 4, "head_dim": WIDTH // 4}

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
    # Three positions for each token (M-RoPE), which text has alike.
    "paddleocr-vl": Architecture(
        "PaddleOCRVLForConditionalGeneration",
        "PaddleOCRVLConfig",
        {
            "text_config": {
                **_HEADS,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "mrope_section": [4, 6, 6],
                },
            },
            "vision_config": {
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "image_size": 28,
            },
            **{f"{name}_token_id": 90 + n for n, name in enumerate(("image", "video"))},
        },
    ),
    "nemotron": _causal("Nemotron", _HEADS),
    # vLLM computes the xIELU in another order.
    "apertus": _causal("Apertus", _GROUPED, tolerance=2e-3),
    "ernie45": _causal("Ernie4_5", _HEADS),
    # The same with mixtures of experts.
    "mixtral": _causal(
        "Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, inside=EXPERTS
    ),
    "qwen2-moe": _causal(
        "Qwen2Moe", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 64}, inside=EXPERTS
    ),
    "qwen3-moe": _causal("Qwen3Moe", {**_HEADS, **_EXPERTS}, inside=EXPERTS),
    "olmoe": _causal(
        "Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}, inside=EXPERTS
    ),
    "glm4-moe": _causal(
        "Glm4Moe",
        {
            **_HEADS,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        inside=EXPERTS,
    ),
    "ernie45-moe": _causal(
        "Ernie4_5_Moe",
        {**_GROUPED, "moe_intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2},
        inside=EXPERTS,
    ),
    "gpt-oss": _causal(
        "GptOss", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}, inside=EXPERTS
    ),
    # One tensor, to which attention and then the MLP are added.
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", _GPT),
    "opt": _causal("OPT", {**_SHAPE, "ffn_dim": 160, "word_embed_proj_dim": WIDTH}),
    # vLLM computes the GELU itself, transformers an approximation of it.
    "bloom": _causal("Bloom", {**_GPT, "hidden_size": WIDTH}, tolerance=1e-3),
    "stablelm": _causal("StableLm", _GROUPED),
    "exaone4": _causal("Exaone4", {**_HEADS, "sliding_window": 8}, inside=PROJECTIONS),
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
        stream=ENDS,
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
        stream=ENDS,
        inside=EXPERTS,
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
        stream=ENDS,
        inside=("attn_in", "head_out"),
    ),
    "gpt-j": _causal("GPTJ", {**_GPT, "rotary_dim": 16}, stream=ENDS, inside=PROJECTIONS),
    "falcon": _causal("Falcon", _SHAPE, stream=ENDS, inside=PROJECTIONS),
    "cohere": _causal("Cohere", {**_GROUPED, "logit_scale": 0.25}, stream=ENDS, inside=PROJECTIONS),
    "cohere2": _causal(
        "Cohere2", {**_GROUPED, "sliding_window": 8}, stream=ENDS, alike=False, inside=PROJECTIONS
    ),
    # Served through vLLM's backend for models of transformers.
    "olmo": _causal("Olmo", _GROUPED),
    "olmo2": _causal("Olmo2", _GROUPED, inside=PROJECTIONS),
    "olmo3": _causal("Olmo3", {**_GROUPED, "sliding_window": 8}, inside=PROJECTIONS),
    "starcoder2": _causal("Starcoder2", _GROUPED),
    "smollm3": _causal("SmolLM3", _GROUPED),
    "seed-oss": _causal("SeedOss", _HEADS),
    "glm": _causal("Glm", _HEADS),
    "arcee": _causal("Arcee", _HEADS),
    "cwm": _causal("Cwm", {**_HEADS, "sliding_window": 8}),
    "neox": _causal("GPTNeoX", {**_SHAPE, "use_parallel_residual": False}),
    "neox-parallel": _causal("GPTNeoX", {**_SHAPE, "use_parallel_residual": True}, stream=ENDS),
    "phi": _causal("Phi", _GROUPED, stream=ENDS, inside=PROJECTIONS),
    # Layers that nobody read: what they hand on is found by trial passes. Mixers with a state:
    "granite-hybrid": _causal(
        "GraniteMoeHybrid",
        {
            **_GROUPED,
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "shared_intermediate_size": 64,
            "num_local_experts": 0,
        },
        stream=ENDS,
        inside=(),
    ),
    "falcon-h1": _causal(
        "FalconH1",
        {**_GROUPED, **_MAMBA, "mamba_d_ssm": 256, "head_dim": 32},
        stream=ENDS,
        inside=(),
    ),
    "lfm2": _causal(
        "Lfm2",
        {
            **_GROUPED,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_dim": WIDTH,
            "conv_dim": WIDTH,
            "conv_dim_out": WIDTH,
            "block_auto_adjust_ff_dim": False,
        },
        stream=ENDS,
        inside=(),
        alike=False,
    ),
    "mamba2": _causal(
        "Mamba2",
        {**_STATE, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
        stream=ENDS,
        inside=(),
    ),
    "nemotron-h": _causal(
        "NemotronH",
        {
            **_HEADS,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
        stream=ENDS,
        inside=(),
    ),
    "zamba2": _causal(
        "Zamba2",
        {
            **_SHAPE,
            "num_key_value_heads": 4,
            "attention_head_dim": 64,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 16,
            "mamba_headdim": 32,
            "n_mamba_heads": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
        },
        stream=ENDS,
        inside=(),
    ),
    # Served through transformers, and not read.
    "gpt-bigcode": _causal("GPTBigCode", {**_GPT, "multi_query": True}, stream=ENDS, inside=()),
    "hunyuan": _causal("HunYuanDenseV1", _HEADS, stream=ENDS, inside=()),
    "vaultgemma": _causal("VaultGemma", {**_HEADS, "sliding_window": 8}, stream=ENDS, inside=()),
    # Scaled streams, latent attention, and more experts.
    "gemma4": _causal(
        "Gemma4",
        {
            **_HEADS,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        config="Gemma4TextConfig",
        stream=ENDS,
        inside=(),
    ),
    "deepseek-v3": _causal(
        "DeepseekV3",
        {
            **_SHAPE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "topk_method": "noaux_tc",
        },
        stream=ENDS,
        inside=(),
        alike=False,
    ),
    "exaone-moe": _causal(
        "ExaoneMoe",
        {**_HEADS, **_EXPERTS, "sliding_window": 8, "first_k_dense_replace": 1},
        stream=ENDS,
        inside=(),
    ),
    "minicpm3": _causal(
        "MiniCPM3",
        {
            **_SHAPE,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
        stream=ENDS,
        inside=(),
    ),
    "afmoe": _causal(
        "Afmoe",
        {
            **_HEADS,
            **_EXPERTS,
            "num_dense_layers": 1,
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.0,
            "mup_enabled": False,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": 8,
        },
        stream=ENDS,
        inside=(),
    ),
}

HALF: dict[str, Architecture] = {
    # vLLM computes its linear attention on a CPU in bfloat16 alone.
    "qwen3-next": _causal(
        "Qwen3Next",
        {
            **_HEADS,
            **_EXPERTS,
            "shared_expert_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        stream=ENDS,
        inside=(),
    ),
}

REFUSED: dict[str, Architecture] = {
    # Four streams side by side, in layers of two stacks.
    "gemma3n": _causal(
        "Gemma3n",
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 8,
            "sliding_window": 8,
        },
        config="Gemma3nTextConfig",
        layer="Gemma3n",
    ),
}


def write(architecture: Architecture, folder: Path) -> PreTrainedModel:
    """Saves the model to `folder` and returns it."""
    model = architecture.build()
    model.save_pretrained(folder)
    return model
