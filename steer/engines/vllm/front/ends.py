"""The tokens that end an answer: those that vLLM knows, and all that the model's files name."""

from __future__ import annotations

from typing import Any

from steer.prompts import end_tokens


def model_ends(vllm_config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer by all that the model's files say of it."""
    model = vllm_config.model_config
    return end_tokens(
        tokenizer,
        declared=[_generation_eos(vllm_config)],
        supposed=[getattr(model.hf_text_config, "eos_token_id", None)],
    )


def known_ends(vllm_config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids at which vLLM ends an answer by itself."""
    declared = _generation_eos(vllm_config)
    several = declared if isinstance(declared, list | tuple) else [declared]
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(id for id in (*several, own) if id is not None)


def _generation_eos(vllm_config: Any) -> Any:
    return vllm_config.model_config.try_get_generation_config().get("eos_token_id")
