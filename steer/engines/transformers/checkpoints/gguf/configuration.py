"""Whether a configuration says of a model what its GGUF file says.

transformers takes over the keys that it knows for an architecture, and passes over the others. A
key that was passed over, a scaling of positions say, would give a model that runs and is another
one; so each key of the architecture is held against the configuration, and one that is not known
here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from steer.engines.transformers.checkpoints.gguf.header import INSTEAD, GGUFHeader, not_converted

ROPE_FREQUENCIES = "rope_freqs.weight"
"""By what each frequency of the rotary embedding is divided: numbers that are no parameters."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTHS = (8192, 4096)
"""What Llama 3.1 and those after it were stretched by, which a file gives as frequencies alone."""


def _attributes(*names: str) -> Callable[[Any], list[Any]]:
    return lambda config: [getattr(config, name) for name in names if hasattr(config, name)]


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of the rotary embedding, of whole attention where layers differ."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def _rotated(config: Any) -> list[Any]:
    share = _rope(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1))
    return [int(_head(config) * share)]


def _head(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


_SAID: dict[str, Callable[[Any], list[Any]]] = {
    "context_length": _attributes("max_position_embeddings", "n_positions"),
    "block_count": _attributes("num_hidden_layers"),
    "embedding_length": _attributes("hidden_size"),
    "feed_forward_length": _attributes("intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab_size": _attributes("vocab_size"),
    "attention.head_count": _attributes("num_attention_heads"),
    "attention.head_count_kv": _attributes("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": lambda config: [_head(config)],
    "attention.value_length": lambda config: [_head(config)],
    "attention.layer_norm_rms_epsilon": _attributes("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": _attributes(
        "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"
    ),
    "attention.sliding_window": _attributes("sliding_window"),
    "attn_logit_softcapping": _attributes("attn_logit_softcapping"),
    "final_logit_softcapping": _attributes("final_logit_softcapping"),
    "rope.freq_base": lambda config: [_rope(config).get("rope_theta")],
    "rope.dimension_count": _rotated,
    "rope.scaling.type": lambda config: [_rope(config).get("rope_type", "default")],
    "rope.scaling.factor": lambda config: [_rope(config).get("factor", 1.0)],
    "rope.scaling.original_context_length": lambda config: [
        _rope(config).get("original_max_position_embeddings")
    ],
    "expert_count": _attributes("num_local_experts", "num_experts"),
    "expert_used_count": _attributes("num_experts_per_tok"),
    "expert_feed_forward_length": _attributes("moe_intermediate_size"),
    "shortconv.l_cache": _attributes("conv_L_cache"),
}
SAID = MappingProxyType(_SAID)
"""Keys of an architecture, and the values of the configuration that say the same."""

_SAME = {"none": "default"}
_NOTHING = frozenset({"tensor_data_layout", "pooling_type", "attention.causal"})
"""Keys that say nothing about what a language model computes."""


def complete_configuration(header: GGUFHeader, config: Any) -> None:
    """Takes over what transformers does not: frequencies that are given as a tensor.

    Raises `SteerError` (`model_not_loaded`) for frequencies that no known stretching explains.
    """
    if ROPE_FREQUENCIES not in header.tensors:
        return
    wanted = header.numbers(ROPE_FREQUENCIES)
    plain = _rope(config)
    for length in _LLAMA3_LENGTHS:
        config.rope_parameters = {
            **plain,
            **_LLAMA3,
            "rope_type": "llama3",
            "factor": round(float(wanted.max()), 4),
            "original_max_position_embeddings": length,
        }
        if torch.allclose(_divided(config), wanted, rtol=1e-4):
            return
    raise not_converted(
        header.path,
        f"its tensor {ROPE_FREQUENCIES!r} stretches positions in an unknown way: {INSTEAD}",
    )


def _divided(config: Any) -> torch.Tensor:
    """By what the configuration divides each frequency."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415 (slow import)

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(stretched), 2).float() / (2 * len(stretched))
    divided: torch.Tensor = (_rope(config)["rope_theta"] ** -exponents) / stretched
    return divided


def check_configuration(header: GGUFHeader, config: Any) -> None:
    """Raises `SteerError` (`model_not_loaded`) where `config` says something else than the file."""
    prefix = f"{header.architecture}."
    for key, value in header.keys.items():
        name = key.removeprefix(prefix)
        if name == key or name in _NOTHING:
            continue
        if name not in SAID:
            raise not_converted(
                header.path, f"its key {key!r} ({value!r}) is not one that is known here: {INSTEAD}"
            )
        found = SAID[name](config)
        if not any(_same(value, one) for one in found):
            raise not_converted(
                header.path,
                f"its key {key!r} is {value!r}, and transformers would run it with "
                f"{found[0] if found else 'none'!r}: {INSTEAD}",
            )


def _same(given: Any, found: Any) -> bool:
    if isinstance(given, list):
        # One number a layer, where layers differ or might.
        return all(_same(one, found) for one in given)
    given = _SAME.get(given, given) if isinstance(given, str) else given
    if isinstance(given, float) and isinstance(found, (int, float)):
        return math.isclose(given, found, rel_tol=1e-5)
    return bool(given == found)
