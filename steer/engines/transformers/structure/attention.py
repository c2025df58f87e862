"""What the heads of a layer attend to, read in the pass that computes it.

transformers' attentions ask `AttentionInterface.get_interface` for the function that attends. For
one pass the answer is that function with a note taken of its values; its weights are what it makes
of values that tell the tokens apart: those of token n are 1 in channel n and 0 elsewhere. So the
weights are the function's own, whatever mask, scale, window, soft cap or sink it has, and whichever
kernel it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from steer.engines.base import Attention, QueriesKeys
from steer.errors import Unsupported
from steer.model import HookPoint, ModelInfo

_ONE_AT_A_TIME = threading.Lock()
"""The interface is the process's own: what one engine puts in its place it also takes away."""


@contextmanager
def attention_read(
    owners: Mapping[int, nn.Module], positions: Sequence[int] | None
) -> Iterator[dict[int, Attention]]:
    """Inside the `with` block the attention of one prompt is noted, at `positions` (None: all), by
    the layers of `owners`, each with a module that lies inside that layer's attention.

    Assumes: one pass of one whole prompt, in this thread. Other threads attend as always.
    """
    found = dict[int, Attention]()

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
        ) -> Any:
            layer = _layer_of(module, owners)
            if layer is not None and layer not in found and _sees_itself(query, key, value):
                one = torch.eye(value.shape[2], dtype=value.dtype, device=value.device)
                told = function(
                    module, query, key, one.expand(*value.shape[:2], -1, -1), *rest, **more
                )
                found[layer] = _attention(told[0], value, positions)
            return function(module, query, key, value, *rest, **more)

        return attend

    with _interface(noted):
        yield found


@contextmanager
def scores_read(owner: nn.Module) -> Iterator[list[QueriesKeys]]:
    """Inside the `with` block it is noted what the attention that `owner` lies inside of is handed,
    of sequences of one token.

    Assumes: one pass, in this thread. Other threads attend as always.
    """
    found: list[QueriesKeys] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
            if owner in set(module.modules()):
                scale = more.get("scaling")
                scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
                queries, keys = query[:, :, 0].float(), key[:, :, 0].float()
                keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
                found.append(QueriesKeys((scale * queries).cpu(), keys.cpu()))
            return function(module, query, key, *rest, **more)

        return attend

    with _interface(noted):
        yield found


@contextmanager
def _interface(noted: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside the `with` block this thread attends with what `noted` makes of the function."""
    here = threading.get_ident()
    with _ONE_AT_A_TIME:
        original = AttentionInterface.get_interface

        def get_interface(
            self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
        ) -> Callable[..., Any]:
            function = original(self, attn_implementation, default)
            return noted(function) if threading.get_ident() == here else function

        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
        try:
            yield
        finally:
            AttentionInterface.get_interface = original  # type: ignore[method-assign]


def check_attention(found: Mapping[int, Attention], layers: Sequence[int], info: ModelInfo) -> None:
    """Raises `Unsupported` (`no_attention`) where the attention of one of `layers` was not seen."""
    missing = sorted(set(layers) - found.keys())
    if missing:
        raise no_interface(missing[0], info)


def no_interface(layer: int, info: ModelInfo) -> Unsupported:
    """For a layer whose attention was not seen."""
    return Unsupported(
        f"{info.architecture} does not attend through transformers' attention interface in "
        f"layer {layer}, so what its heads attend to cannot be read",
        code="no_attention",
    )


def attention_modules(
    targets: Mapping[HookPoint, Any], layers: Sequence[int], info: ModelInfo
) -> dict[int, nn.Module]:
    """A module inside the attention of each of `layers`: its output projection."""
    for layer in layers:
        info.check_point(HookPoint(layer, "head_out"), param="/layers")
    return {layer: targets[HookPoint(layer, "head_out")].module for layer in layers}


def _layer_of(module: nn.Module, owners: Mapping[int, nn.Module]) -> int | None:
    inside = set(module.modules())
    return next((layer for layer, one in owners.items() if one in inside), None)


def _sees_itself(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether one sequence attends to its own tokens and nothing else."""
    return query.shape[0] == 1 and query.shape[2] == key.shape[2] == value.shape[2]


def _attention(told: Tensor, value: Tensor, positions: Sequence[int] | None) -> Attention:
    """From what was attended of the values that tell tokens apart, `[1, tokens, heads, tokens]`,
    and the values, `[1, groups, tokens, head_dim]`."""
    rows = list(range(told.shape[1])) if positions is None else list(positions)
    weights = told[0, rows].transpose(0, 1)
    repeated = value[0].repeat_interleave(weights.shape[0] // value.shape[1], 0)
    return Attention(weights.float().cpu().clone(), repeated.float().cpu().clone())
