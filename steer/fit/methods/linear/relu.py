"""Regression through a ReLU: y ≈ ReLU(⟨w, x⟩ + b)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 100


@dataclass(frozen=True)
class ReluFit:
    """w `[d]` and b."""

    weight: Tensor
    bias: float

    def __call__(self, states: Tensor) -> Tensor:
        """ReLU(⟨w, x⟩ + b) of each row."""
        found: Tensor = (states @ self.weight + self.bias).relu()
        return found


def relu_regression(states: Tensor, targets: Tensor, penalty: float) -> ReluFit:
    """w and b that lower Σ(ReLU(⟨w, x⟩ + b) − y)² + penalty·σ²·‖w‖², from `states` `[n, d]` and
    `targets` `[n]`, float64; σ² is the mean variance of a channel.

    Starts from ridge regression of the positive part and follows the gradient (L-BFGS, on states
    centred and scaled by σ). The result is a local minimum.
    """
    centre = states.mean(0)
    scale = (states - centre).square().mean().sqrt().clamp_min(1e-12)
    x = (states - centre) / scale
    start = _ridge(x, targets.clamp_min(0.0), penalty)
    weight = start[:-1].clone().requires_grad_(True)
    bias = start[-1:].clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=ROUNDS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        error = (x @ weight + bias).relu() - targets
        found: Tensor = error.square().sum() + penalty * weight.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.inference_mode(False), torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    row = weight.detach() / scale
    return ReluFit(row, float(bias.detach() - row @ centre))


def _ridge(x: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """The weights and, last, the bias of ridge regression on centred `x` `[n, d]`."""
    gram = x.T @ x
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, x.T @ targets)
    return torch.cat([weight, targets.mean()[None]])


def unexplained(targets: Tensor, found: Tensor) -> float:
    """Σ(y − ŷ)² / Σy²: 0 is all of it, 1 what saying 0 would leave."""
    return float((targets - found).square().sum() / targets.square().sum())
