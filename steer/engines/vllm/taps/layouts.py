"""Which layout a vLLM model's decoder layers have, and the way from their last state to logits.

A family that was read has its own layout. Any other model has the ends of its layers, `resid_pre`
and `resid_post`, in the form that trial passes prove (`streams.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from steer.engines.vllm.taps.decoder import TextDecoder, unsupported
from steer.engines.vllm.taps.inner_sites import InnerSite
from steer.engines.vllm.taps.layer_streams import ENDS, EndsOnly, FusedAdd
from steer.engines.vllm.taps.streams import Streams
from steer.engines.vllm.taps.taps import DecoderStack, Layout
from steer.errors import Unsupported

Unembed = Callable[[Tensor], Tensor | None]

_ADDED_BETWEEN = "deepstack_input_embeds"
"""A parameter of models that add the features of images to the stream between two layers."""


def choose_stack(
    decoder: TextDecoder, streams: Streams, inner: tuple[InnerSite, ...] = ()
) -> DecoderStack:
    """The layers of `decoder` with their layout, and with `inner` sites as well. Raises
    `Unsupported` where a family's layers are not what was read."""
    return DecoderStack(decoder.layers, _layout(decoder, streams), decoder.n_layers, inner)


def find_unembedding(decoder: TextDecoder, streams: Streams) -> Unembed | None:
    """The final norm and output matrix, from states `[T, d]` after the last layer to logits
    `[T, vocab]`, scaled and capped as the model does; None on a worker without them.

    Under tensor parallelism every worker must call it, and some are answered None. It raises
    `Unsupported` where trial passes showed no final norm.
    """
    if not decoder.ends_here:
        return None
    ending = streams.ending
    if ending is None:
        return _no_unembedding(decoder)
    compute_logits: Unembed = decoder.model.compute_logits  # type: ignore[assignment]
    like = next(iter([*ending.norm.parameters(), *decoder.owner.parameters()]))

    @torch.inference_mode()
    def unembed(states: Tensor) -> Tensor | None:
        return compute_logits(ending(states.to(like)))

    return unembed


def _layout(decoder: TextDecoder, streams: Streams) -> Layout:
    family = decoder.family
    if family is not None:
        # With one layer nothing is handed on, and no pass tells halves from a whole.
        if streams.halves is not None and isinstance(family.layout, FusedAdd) != streams.halves:
            raise unsupported(decoder.model, "its layers no longer hand on what Steer knows of")
        return family.layout
    if streams.halves is None:
        raise unsupported(
            decoder.model, "a pipeline stage of one layer does not show how the stream is handed on"
        )
    sites = ENDS
    if _ADDED_BETWEEN in inspect.signature(decoder.owner.forward).parameters:
        sites = ("resid_post",)
    return FusedAdd(None, sites) if streams.halves else EndsOnly(sites)


def _no_unembedding(decoder: TextDecoder) -> Unembed:
    name = type(decoder.model).__name__

    def unembed(states: Tensor) -> Tensor | None:  # noqa: ARG001
        raise Unsupported(
            f"the way from the last layer of {name} to its logits is not one final norm, so its "
            "states cannot be read as tokens on vLLM: use the transformers engine for that",
            code="unsupported_unembedding",
        )

    return unembed
