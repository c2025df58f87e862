"""From pre-activations `[T, n]` to activations, as each architecture is trained.

A trained SAE runs on `steer.artefacts.sae`, which the tests hold these to.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

BANDWIDTH = 0.1
"""How near its threshold a pre-activation must be to move it, in the units of the rows, whose mean
square is 1 for each channel. Of the order of what a step of training changes."""


def largest_of_rows(pre: Float[Tensor, "T n"], k: int) -> Int[Tensor, "T k"]:
    """Where the k largest of each row are."""
    return pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False).indices


def largest_of_batch(
    pre: Float[Tensor, "T n"], k: int
) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Row and column of the k · T largest of the whole batch, row by row (2412.06410)."""
    count = min(k * len(pre), pre.numel())
    places = pre.flatten().topk(count, sorted=False).indices.sort().values
    return places // pre.shape[1], places % pre.shape[1]


class _Above(torch.autograd.Function):
    """a where a > θ, else 0; the threshold learns from the values beside it (2407.14435)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        moved = -(threshold / BANDWIDTH) * near * grad
        return grad * (pre > threshold), moved.sum(0)


class _Active(torch.autograd.Function):
    """1 where a > θ, else 0; only the threshold learns from it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        return None, (-(1 / BANDWIDTH) * near * grad).sum(0)


def above(
    pre: Float[Tensor, "T n"], threshold: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "T n"], Float[Tensor, " T"]]:
    """JumpReLU's activations, and how many latents each row has active, in a way that the
    thresholds learn from."""
    pre = pre.relu()
    kept: Tensor = _Above.apply(pre, threshold)  # type: ignore[no-untyped-call]
    active: Tensor = _Active.apply(pre, threshold)  # type: ignore[no-untyped-call]
    return kept, active.sum(-1)


def pursued(
    x: Float[Tensor, "T d"], atoms: Float[Tensor, "n d"], steps: int
) -> tuple[Int[Tensor, "T steps"], Float[Tensor, "T steps"]]:
    """Matching pursuit (2506.03093): in every step the atom that best meets what the others left
    over, and how far it goes; rows of `atoms` have length one."""
    left, places, values = x, [], []
    for _ in range(steps):
        with torch.no_grad():
            best = (left @ atoms.T).argmax(-1)
        chosen = functional.embedding(best, atoms)
        value = (left * chosen).sum(-1).relu()
        left = left - value[:, None] * chosen
        places.append(best)
        values.append(value)
    return torch.stack(places, 1), torch.stack(values, 1)
