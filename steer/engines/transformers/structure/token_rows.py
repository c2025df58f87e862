"""The rows of a Hugging Face model's output matrix, with its final norm folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer.engines.token_rows import folded_rows, no_token_rows
from steer.engines.transformers.structure.calls import given_tensor
from steer.engines.transformers.structure.head import Head


def token_rows(
    model: nn.Module, head: Head, tokens: Sequence[int], width: int
) -> Float[Tensor, "N d_model"]:
    """See `Engine.token_rows`. The norm is whatever stands between the last block and the output
    matrix, as `head` runs it; `width` is that of the states."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    output: nn.Module | None = find()
    weight = getattr(output, "weight", None)
    if output is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise no_token_rows(type(model).__name__, "it has no output matrix of its own")
    if weight.shape[1] != width:
        raise no_token_rows(
            type(model).__name__,
            f"its output matrix has width {weight.shape[1]}, and its states {width}",
        )
    if not weight.is_floating_point() or weight.is_meta:
        raise no_token_rows(type(model).__name__, "its output matrix is not held as plain numbers")

    def norm(states: Tensor) -> Tensor:
        given: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = given_tensor(args, kwargs)
            if found is not None:
                given.append(found.detach().clone())

        handle = output.register_forward_pre_hook(see, with_kwargs=True)
        try:
            head(model, states)
        finally:
            handle.remove()
        if len(given) != 1 or given[0].shape[-1] != width:
            raise no_token_rows(
                type(model).__name__, "its output matrix is not run as a module on states"
            )
        return given[0].reshape(states.shape)

    with torch.no_grad():
        mean = weight.detach().mean(0, dtype=torch.float32)
        return folded_rows(weight.detach()[list(tokens)].float() - mean, norm)
