"""Caches for single sequences, of the class that the model itself makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from steer.engines.proof import agree
from steer.engines.transformers.cache import given_cache, layer_kinds
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.room import token_bytes
from steer.engines.transformers.structure.decoder import text_config, unsupported
from steer.errors import Unsupported

_TOKENS = 5


class OwnCaches:
    """Makes a cache for a new sequence, as `generate` does."""

    @torch.inference_mode()
    def __init__(self, hooked: HookedModel) -> None:
        """Raises `Unsupported` for an encoder, and for a model that keeps no cache."""
        self._model = hooked.model
        cache, _ = _pass(hooked, _TOKENS, None)
        self._made_by_model = cache is not None
        self.causal = _is_causal(hooked)
        """Whether no token of a prompt sees those after it."""
        # As their configurations say who are encoders or decoders; a prefix may be read both ways.
        if not self.causal and getattr(text_config(self._model), "is_decoder", True) is False:
            raise _no_decoder(hooked)
        if cache is None:
            # Some fill one that they are given and do not return it.
            cache = self.new()
            _pass(hooked, _TOKENS, cache)
            if not any(getattr(layer, "is_initialized", False) for layer in cache.layers):
                raise _no_cache(hooked) if self.causal else _no_decoder(hooked)
        self.kinds = layer_kinds(cache)
        """The class names of its layers."""
        self.token_bytes = token_bytes(cache, _TOKENS)
        """What a token takes in it."""

    def new(self) -> Any:
        """An empty cache; None for a model that makes its own in its first pass."""
        return None if self._made_by_model else DynamicCache(config=text_config(self._model))


def _is_causal(hooked: HookedModel) -> bool:
    (_, short), (_, long) = (_pass(hooked, length, None) for length in (3, 5))
    return agree(short, long[:, :3], next(hooked.model.parameters()).dtype)


def _no_cache(hooked: HookedModel) -> Unsupported:
    return unsupported(
        hooked.info.architecture, "it keeps no cache: every token would be computed from the start"
    )


def _no_decoder(hooked: HookedModel) -> Unsupported:
    reason = "it is an encoder: a token's state depends on the tokens after it"
    if getattr(text_config(hooked.model), "is_decoder", True) is False:
        reason += " (the configuration of a decoder says is_decoder=True)"
    return unsupported(hooked.info.architecture, reason)


def _pass(hooked: HookedModel, length: int, cache: Any) -> tuple[Any, Tensor]:
    """The cache that a pass returns, and its logits."""
    ids = torch.arange(1, length + 1, device=hooked.device)[None]
    outputs, _ = hooked.forward(None, input_ids=ids, key_values=cache, use_cache=True)
    return given_cache(outputs), outputs.logits.float()
