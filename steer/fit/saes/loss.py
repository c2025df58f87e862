"""What a training minimises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from steer.fit.saes.network import OUTLIER, Passed, SAENetwork


@dataclass(frozen=True)
class Loss:
    """The parts of one batch's loss, each with its weight already, and what they add up to."""

    unexplained: Tensor
    dead: Tensor
    sparsity: Tensor
    labels: Tensor

    @property
    def total(self) -> Tensor:
        return self.unexplained + self.dead + self.sparsity + self.labels


def loss_of(
    network: SAENetwork,
    x: Float[Tensor, "T d"],
    passed: Passed,
    dead: Bool[Tensor, " n"],
    labels: Float[Tensor, "T c"] | None = None,
    *,
    settled: float = 1.0,
) -> Loss:
    """The loss of a batch; `labels` are 0, 1, or NaN where nothing is known, for the first c
    latents. `settled`, from 0 to 1, is how much of the penalty on active latents counts: directions
    have to be there before thresholds choose among them."""
    options, nothing = network.options, x.new_zeros(())
    # A row that is too long counts as one that is not: one of them would outweigh all others.
    longest = OUTLIER * math.sqrt(x.shape[1])
    weight = (longest / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    error = weight * (x - passed.rebuilt)
    variance = (weight * (x - x.mean(0))).square().sum().clamp_min(1e-12)
    sparsity = nothing
    if passed.count is not None:
        # Towards k on average, as far in shares as in either direction (2407.14435, appendix).
        sparsity = (
            settled * options.sparsity_weight * (passed.count.mean() / options.k - 1).square()
        )
    return Loss(
        unexplained=error.square().sum() / variance,
        dead=options.aux_weight * revival(network, weight * x, error.detach(), dead),
        sparsity=sparsity,
        labels=nothing if labels is None else options.guide_weight * guidance(network, x, labels),
    )


def revival(
    network: SAENetwork,
    x: Float[Tensor, "T d"],
    error: Float[Tensor, "T d"],
    dead: Bool[Tensor, " n"],
) -> Tensor:
    """The share of `error` that the dead latents leave over: the strongest of them try to explain
    it, and so come to life (2406.04093)."""
    chosen = dead.nonzero()[:, 0]
    if not len(chosen):
        return x.new_zeros(())
    attempt = network.explained(x, chosen, min(network.options.aux_k, len(chosen)))
    return (error - attempt).square().sum() / error.square().sum().clamp_min(1e-12)


def guidance(network: SAENetwork, x: Float[Tensor, "T d"], labels: Float[Tensor, "T c"]) -> Tensor:
    """The cross entropy of the first c latents' pre-activations with their labels, summed over
    latents (G-SAE, 2506.19382); the mean over the rows that have one."""
    known = ~labels.isnan()
    logits = network.pre(x, torch.arange(labels.shape[1], device=x.device))
    found = functional.binary_cross_entropy_with_logits(
        logits, labels.nan_to_num(0.0), reduction="none"
    )
    total = (found * known).sum(0) / known.sum(0).clamp_min(1)
    return total.sum()
