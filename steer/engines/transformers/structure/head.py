"""What a model computes after its last decoder block, for any states.

The model's own forward pass is replayed while every block returns the wanted states, so that what
lies between the last block and the logits (norm, projection, transform, bias, scale, soft cap) is
the model's own, in its own order, and none of it is known here by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.transformers.structure.calls import (
    Call,
    at_rest,
    first_tensor,
    returning,
    standing_in,
)
from steer.errors import Unsupported

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_HALF = 2e-2
"""Relative to the spread of the logits: one row at a time is not summed as five are."""


class Head:
    """From the last block's output to logits.

    Assumes: nobody else calls the model meanwhile.
    Guarantees: the last block's output gives the model's own logits, or every call raises.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], seen: Mapping[nn.Module, Call]
    ) -> None:
        """Proves the head of `model` with `seen`, a plain pass of it on one prompt."""
        # Not the model itself: maps of hook points are kept for as long as their models live.
        self._returned = {block: seen[block].returned for block in blocks if block in seen}
        self._dtype = first_tensor(seen[blocks[-1]].returned).dtype
        self.refusal: Unsupported | None = None
        """Why this model's states cannot be read as logits; None where they can."""
        reason = self._mismatch(model, seen[blocks[-1]].output, seen[model].returned)
        if reason is not None:
            self.refusal = Unsupported(
                f"the states of {type(model).__name__} cannot be read as next-token logits: "
                f"{reason}",
                code="no_unembedding",
            )

    def __call__(self, model: nn.Module, states: Tensor) -> Tensor:
        """`[..., d_model]` states to float32 logits `[..., vocab]`; gradients flow back to states
        that ask for them. Raises `Unsupported`."""
        if self.refusal is not None:
            raise self.refusal
        return self._logits(model, states)

    def _logits(self, model: nn.Module, states: Tensor) -> Tensor:
        device = next(model.parameters()).device
        # One token in each row, so that no state can see another.
        rows = states.to(device, self._dtype).reshape(-1, 1, states.shape[-1])
        ids = torch.ones(len(rows), 1, dtype=torch.long, device=device)
        stand_ins = {block: returning(value, rows) for block, value in self._returned.items()}
        options = {"use_cache": False, **_without_loss(model)}
        follow = states.requires_grad
        with at_rest(model), torch.set_grad_enabled(follow), standing_in(stand_ins):
            logits: Tensor = model(input_ids=ids, **options).logits
        return logits.float().reshape(*states.shape[:-1], -1)

    def _mismatch(self, model: nn.Module, last: Tensor | None, outputs: Any) -> str | None:
        """In what way the head does not give the model's own logits for the last block's output."""
        wanted = getattr(outputs, "logits", None)
        if not isinstance(wanted, Tensor) or last is None:
            return "it returns none"
        if last.shape[:-1] != wanted.shape[:-1]:
            return f"its last block returns {list(last.shape)} where they are {list(wanted.shape)}"
        wanted = wanted.float()
        if not wanted.isfinite().all():
            return "its logits are not finite"
        try:
            found = self._logits(model, last)
        except Exception as failure:
            return f"what follows its last block does not run alone ({failure})"
        if not close(found, wanted, last.dtype):
            return "they depend on more than what its last block returns"
        return None


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether float32 logits of a model of `dtype` are the same but for rounding."""
    spread = (wanted - wanted.mean()).norm()
    return bool((found - wanted).norm() <= _TOLERANCE.get(dtype, _TOLERANCE_HALF) * spread)


def _without_loss(model: nn.Module) -> dict[str, bool]:
    """What keeps a model from computing a loss over routers, which do not run here."""
    has_routers = getattr(model.config, "output_router_logits", False)
    return {"output_router_logits": False} if has_routers else {}
