"""A tiny random model of any class of transformers: its own configuration, with small sizes.

Every size that a configuration states under a known name is set, in it and in the configurations
inside it; what follows from other rules than these is in `OVERRIDES`, by model type.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 25_000_000
"""Parameters; what stays larger has a size under a name that is not known here."""

VOCABULARY, WIDTH, LAYERS = 99, 32, 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "embedding_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "projection_dim": WIDTH,
    "mm_embed_dim": WIDTH,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "attention_head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "attention_window_size": 6,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "num_heads": 4,
    "lru_width": WIDTH,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "n_positions": 128,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "rotary_dim": 4,
    "out_hidden_size": WIDTH,
    "text_hidden_size": WIDTH,
    "depth": 2,
    "embed_dim": WIDTH,
    "image_size": 16,
    "patch_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_BY_KIND: dict[tuple[str, ...], dict[str, Any]] = {
    (
        "axk1",
        "axk2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "longcat_flash",
        "minicpm3",
        "youtu",
        "kimi_k25",
    ): _MLA,
    (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen2_5_omni_text",
        "paddleocr_vl_text",
        "glm4v_text",
        "glm_ocr_text",
    ): {"rope_parameters": _MROPE},
    (
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hunyuan_vl_text",
        "ministral",
        "nemotron",
    ): {"head_dim": 8, "num_key_value_heads": 2},
    ("gemma4_text", "gemma4_unified_text"): _ALTERNATING,
    ("mistral4", "mistral_large4_text"): {"num_key_value_heads": 4, "head_dim": 16},
    ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"): {"vision_start_token_id": 90},
    ("chameleon", "emu3"): {"vocabulary_map": {"<image>": 90}},
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: fields for names, fields in _BY_KIND.items() for name in names},
    "bailing_hybrid": {"layer_group_size": 2, **_MLA},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2, **_MLA},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, **_MLA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 8},
    "prophetnet": {"num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS},
    "step3p5": {"sliding_window": 6},
    "xlstm": {"qk_dim_factor": 1.0},
    "xlnet": {"d_head": 8, "d_inner": 48},
    "zamba": {"num_hidden_layers": 7, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type."""

_OMITTED = {
    "dbrx": ("attn_config",),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
}
"""Sizes that a configuration states and does not take, by model type."""


class NotBuilt(Exception):
    """Why a class has no tiny model here."""


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of `config_class` with small sizes."""
    plain = config_class()
    fields = {name: value for name, value in SIZES.items() if _states(plain, name)}
    for name in config_class.sub_configs or {}:
        part = getattr(plain, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = tiny_config(type(part)).to_dict()
    fields |= OVERRIDES.get(config_class.model_type, {})
    for name in _OMITTED.get(config_class.model_type, ()):
        fields.pop(name, None)
    return config_class(**fields)


def _states(config: PreTrainedConfig, name: str) -> bool:
    """Whether `config` has a number under `name`, which may be set."""
    try:
        value = getattr(config, name, None)
    except Exception:  # a value for each layer
        return False
    own = getattr(type(config), name, None)
    if isinstance(own, property) and own.fset is None:
        return False
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (
        name.endswith("token_id") and hasattr(config, name)
    )


def tiny(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A random model of `model_class`, in eval mode. Raises `NotBuilt`."""
    try:
        config = tiny_config(model_class.config_class)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config).parameters())
        if size > LARGEST:
            raise NotBuilt(f"still {size:,} parameters")
        torch.manual_seed(0)
        model = model_class(config).eval()
        _run(model)
        return model
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error


def _run(model: PreTrainedModel) -> None:
    """Raises where sizes do not fit each other; not where other inputs than ids are asked for."""
    ids = torch.arange(1, 6)[None]
    for use_cache in (False, True):
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=use_cache)
        except (RuntimeError, IndexError, AttributeError):
            raise
        except Exception as error:
            if "NoneType" in str(error):
                raise
            return
