"""The rows of a vLLM model's output matrix, with its final norm folded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.token_rows import folded_rows, no_token_rows
from steer.engines.vllm.taps.decoder import TextDecoder
from steer.engines.vllm.taps.ending import Ending
from steer.engines.vllm.taps.layouts import Unembed
from steer.engines.vllm.taps.streams import Streams

_SHARD = "shard_indices"
"""Where vLLM's output matrix says which part of the vocabulary this rank has."""


class HeadRows:
    """The rows that this worker has; a tensor-parallel rank has those of its part of the
    vocabulary.

    Assumes: every rank is asked at once, because finding the matrix computes logits.
    """

    def __init__(self, decoder: TextDecoder, ending: Ending) -> None:
        self._decoder, self._ending = decoder, ending
        self._like = next(iter([*ending.norm.parameters(), *decoder.owner.parameters()]))
        self._matrix: nn.Module | None = None
        self._mean: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], width: int, unembed: Unembed) -> dict[int, Tensor]:
        """Those of `tokens` that are here, each with its row `[width]`. Raises `Unsupported`."""
        if self._matrix is None:
            self._matrix = self._found(width, unembed)
        weight = getattr(self._matrix, "weight", None)
        name = type(self._decoder.model).__name__
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise no_token_rows(name, "its output matrix is not held as plain numbers")
        shard: Any = getattr(self._matrix, _SHARD)
        first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        if self._mean is None:
            self._mean = _mean(weight[: end - first], self._matrix)
        mine = [token for token in tokens if first <= token < end]
        if not mine:
            return {}
        rows = weight[[token - first for token in mine]].float() - self._mean
        rows = folded_rows(rows, self._norm)
        return dict(zip(mine, rows, strict=True))

    def _norm(self, states: Tensor) -> Tensor:
        return self._ending(states.to(self._like))

    def _found(self, width: int, unembed: Unembed) -> nn.Module:
        """The module that what makes the logits is given."""
        found: list[nn.Module] = []

        def see(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = (*args, *named.values())
            found.extend(one for one in given if isinstance(one, nn.Module))

        with ExitStack() as hooks:
            for module in _logits_makers(self._decoder.model):
                hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            unembed(torch.zeros(1, width, device=self._like.device))
        heads = list(dict.fromkeys(one for one in found if hasattr(one, _SHARD)))
        if len(heads) != 1:
            raise no_token_rows(
                type(self._decoder.model).__name__, "its logits do not come of one output matrix"
            )
        return heads[0]


def _mean(mine: Tensor, matrix: Any) -> Tensor:
    """The mean of all rows, of which `mine` are those of this rank."""
    from vllm.distributed import tensor_model_parallel_all_reduce  # noqa: PLC0415

    total: Tensor = mine.sum(0, dtype=torch.float32)
    if matrix.tp_size > 1:
        total = tensor_model_parallel_all_reduce(total)
    mean: Tensor = total / matrix.org_vocab_size
    return mean


def find_rows(decoder: TextDecoder, streams: Streams) -> HeadRows | None:
    """The rows of the worker that has the last layer and its norm; None on any other."""
    if not decoder.ends_here or streams.ending is None:
        return None
    return HeadRows(decoder, streams.ending)


def _logits_makers(model: nn.Module) -> Iterator[nn.Module]:
    return (one for one in model.modules() if "LogitsProcessor" in type(one).__name__)
