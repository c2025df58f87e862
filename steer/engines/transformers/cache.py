"""What transformers' models call their cache, and what it is made of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_CACHE_KEYWORDS = ("cache", "past_key_values", "cache_params", "state")
"""How models call their cache: transformers renamed it in 5.24; Mamba and RWKV have names
of their own."""


def cache_keyword(model: nn.Module) -> str:
    """The name of the argument in which `model` takes its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_KEYWORDS if name in parameters), "past_key_values")


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among what a call takes or returns, by whichever name; None without one."""
    return next((arguments[name] for name in _CACHE_KEYWORDS if name in arguments), None)


PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of transformers' caches that hold keys and values alone (or none): rows of unlike length
can share them."""


def layer_kinds(cache: Any) -> list[str]:
    """The class names of the layers of a cache, or of the cache itself where it has no layers."""
    own = getattr(cache, "self_attention_cache", cache)
    layers = getattr(own, "layers", None)
    return [type(layer).__name__ for layer in layers] if layers else [type(own).__name__]
