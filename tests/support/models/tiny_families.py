"""Random three-layer models that differ in their blocks' parts, or in what follows them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_models import LAYERS, VOCABULARY, WIDTH
from torch import nn

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}
_BART = {"d_model": WIDTH, "ffn_dim": 48, "attention_heads": 4, "num_layers": LAYERS}
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # A name: the model's class, its configuration's, and what is not as in the others.
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_GROUPED, "logits_scaling": 8.0}),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_GROUPED, **_EXPERTS, "logits_scaling": 8.0},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, **_EXPERTS, "output_router_logits": True},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_GROUPED, "logit_scale": 0.0625}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**_GROUPED, "logit_scale": 0.25}),
    "falcon-h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_GROUPED,
            "lm_head_multiplier": 0.3,
            "mamba_d_ssm": WIDTH,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "gemma3-images": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_SHAPE, **_GEMMA},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {**_SHAPE, **_GEMMA, "model_type": "gemma2"},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
            "projection_dim": WIDTH,
            "image_token_index": VOCABULARY - 1,
        },
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {**_GEMMA, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**_GROUPED, "head_dim": 8}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", _GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"use_parallel_residual": False}),
    "neox-parallel": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"use_parallel_residual": True}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gpt1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt-post-norm": ("OPTForCausalLM", "OPTConfig", {**_OPT, "do_layer_norm_before": False}),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", _BART),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", {}),
    "bert": ("BertLMHeadModel", "BertConfig", {"is_decoder": True}),
    "rembert": (
        "RemBertForCausalLM",
        "RemBertConfig",
        {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24},
    ),
}


def build_family(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of the family, in eval mode."""
    model, config, more = FAMILIES[name]
    given = more if "text_config" in more else {**_SHAPE, **more}
    torch.manual_seed(list(FAMILIES).index(name))
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**given))
    return built.to(dtype).eval()
