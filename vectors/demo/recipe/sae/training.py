"""Trains a TopK SAE on states: AdamW, unit decoder rows, and an auxiliary loss that revives dead
latents (2406.04093)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class TrainingOptions:
    """Sizes and rates. `dead_after` is in steps without an activation."""

    latents: int = 1024
    k: int = 16
    steps: int = 2000
    batch: int = 1024
    lr: float = 2e-3
    dead_after: int = 100
    aux_k: int = 64
    aux_weight: float = 1 / 32
    seed: int = 0


@dataclass(frozen=True)
class Weights:
    """The trained matrices, in the units of the states: `W_enc` `[d, n]`, `W_dec` `[n, d]` with
    rows of length one, so that an activation is a length in the residual stream."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


def keep_largest(pre: Tensor, k: int) -> Tensor:
    """The k largest values of each row, if positive; zero elsewhere."""
    values, places = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


class Trainer:
    """One training run.

    Assumes: states float32 `[N, d]`; they are centred and scaled to a mean length of √d inside.
    Guarantees: the same states and options give the same weights on one machine.
    """

    def __init__(self, states: Tensor, options: TrainingOptions) -> None:
        self.states, self.options = states, options
        self.generator = torch.Generator().manual_seed(options.seed)
        width = states.shape[1]
        self.mean = states.mean(0)
        self.scale = math.sqrt(width) / float((states - self.mean).norm(dim=-1).mean())
        decoder = torch.randn(options.latents, width, generator=self.generator)
        decoder /= decoder.norm(dim=-1, keepdim=True)
        self.W_dec = decoder.clone().requires_grad_()
        self.W_enc = decoder.T.clone().requires_grad_()
        self.b_enc = torch.zeros(options.latents, requires_grad=True)
        self.b_dec = torch.zeros(width, requires_grad=True)
        self.idle = torch.zeros(options.latents, dtype=torch.long)
        parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = torch.optim.AdamW(parameters, options.lr, (0.9, 0.99), weight_decay=0.0)

    def run(self) -> Weights:
        """All steps: a short warm-up, a constant rate, and a linear fall over the last third."""
        steps = self.options.steps
        bar = tqdm(range(steps), desc="SAE", unit="step", mininterval=5)
        for step in bar:
            fraction = min(1.0, (step + 1) / 50, (steps - step) / (steps / 3))
            for group in self.optimizer.param_groups:
                group["lr"] = self.options.lr * fraction
            loss = self.step()
            if step % 100 == 0:
                bar.set_postfix(unexplained=f"{loss:.4f}", dead=int(self.dead().sum()))
        return self.weights()

    def dead(self) -> Tensor:
        return self.idle > self.options.dead_after

    def step(self) -> float:
        """One batch; returns the share of the variance that is not explained."""
        rows = torch.randint(len(self.states), (self.options.batch,), generator=self.generator)
        x = (self.states[rows] - self.mean) * self.scale
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        active = keep_largest(pre, self.options.k)
        error = x - (active @ self.W_dec + self.b_dec)
        variance = (x - x.mean(0)).square().sum()
        unexplained = error.square().sum() / variance
        loss = unexplained + self.options.aux_weight * self.revival(pre, error)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)
        used = (active > 0).any(0)
        self.idle = torch.where(used, 0, self.idle + 1)
        return float(unexplained.detach())

    def revival(self, pre: Tensor, error: Tensor) -> Tensor:
        """The dead latents' attempt to explain what the live ones left over."""
        dead = self.dead()
        if not bool(dead.any()):
            return torch.zeros(())
        masked = pre.masked_fill(~dead, -torch.inf)
        attempt = keep_largest(masked, min(self.options.aux_k, int(dead.sum()))) @ self.W_dec
        target = error.detach()
        return (target - attempt).square().sum() / target.square().sum()

    def weights(self) -> Weights:
        """Back in the units of the states: mean and scale folded in."""
        with torch.no_grad():
            return Weights(
                W_enc=self.W_enc.clone(),
                b_enc=self.b_enc / self.scale,
                W_dec=self.W_dec.clone(),
                b_dec=self.mean + self.b_dec / self.scale,
            )
