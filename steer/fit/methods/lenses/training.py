"""Translators trained by the divergence itself, from where the closed form left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.fit.methods.bookmark import (
    Bookmark,
    FallingRates,
    resume_training,
    training_state,
)
from steer.fit.methods.lenses.regression import Translator
from steer.fit.states import Progress


@dataclass(frozen=True)
class Training:
    """`steps` of Adam on `rows` tokens each, at a `rate` that falls to 0."""

    steps: int
    rows: int
    rate: float
    seed: int


class _Correction(nn.Module):
    """What is added to a translator: a map of whitened states, in units of what is wanted.

    A residual stream has a few dimensions that are a hundred times as large as the others, on which
    one rate does not fit all.
    """

    def __init__(self, base: Translator) -> None:
        super().__init__()
        width = len(base.bias)
        self.base = base
        self.matrix = nn.Parameter(torch.zeros(width, width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        base = self.base
        white = torch.linalg.solve_triangular(base.factor, (x - base.mean).T, upper=False).T
        moved: Tensor = (white @ self.matrix + self.shift) * base.spread
        return x + functional.linear(x, base.weight, base.bias) + moved

    def folded(self) -> tuple[Tensor, Tensor]:
        """W and b of the whole."""
        base = self.base
        upper = base.factor.T
        more = torch.linalg.solve_triangular(upper, self.matrix.detach() * base.spread, upper=True)
        weight = base.weight + more.T
        return weight, base.bias + self.shift.detach() * base.spread - more.T @ base.mean


def train(
    engine: Engine,
    bases: Mapping[int, Translator],
    states: Float[Tensor, "points n d_model"],
    training: Training,
    what: Any,
    progress: Progress | None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """W and b of each block's translator after `training` on `states`, those of `layer_points`.

    `what`, plain values, is all that `bases` and `states` depend on: training of the same that was
    ended goes on from its bookmark. `progress` is told of every step. Raises `Unsupported`
    (`no_gradients`). Memory: four lenses, and 4 · rows · vocabulary floats.
    """
    able = differentiable(engine)
    blocks = {block: _Correction(base) for block, base in bases.items()}
    parameters = [one for block in blocks.values() for one in block.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=training.rate)
    order = torch.randperm(
        states.shape[1], generator=torch.Generator().manual_seed(training.seed)
    ).repeat(-(-training.steps * training.rows // states.shape[1]))
    bookmark = Bookmark(engine, ["tuned-lens training", what, astuple(training)])
    rates, kept = FallingRates(optimiser, training.steps), bookmark.read()
    begun = int(kept["done"]) if kept else 0
    if kept:
        resume_training(optimiser, kept)
        if progress is not None:
            progress(begun)
    for step in range(begun, training.steps):
        rates.at(step)
        chosen = states[:, order[step * training.rows :][: training.rows]]
        wanted = able.differentiate(_wanted(chosen[-1]))
        optimiser.zero_grad()
        # A piece of work for each block, so that requests go on between them.
        for block, correction in blocks.items():
            able.differentiate(_descent(correction, chosen[block], wanted))
        optimiser.step()
        bookmark.write(partial(_kept, optimiser, step + 1))
        if progress is not None:
            progress(1)
    return {block: one.folded() for block, one in blocks.items()}


def _kept(optimiser: torch.optim.Optimizer, done: int) -> dict[str, Tensor]:
    return {"done": torch.tensor(done), **training_state(optimiser)}


def _wanted(last: Tensor) -> Callable[[DifferentiableModel], Tensor]:
    """Gives the model's own distributions `[n, vocab]`."""

    def work(model: DifferentiableModel) -> Tensor:
        with torch.no_grad():
            return model.unembed(last).softmax(-1)

    return work


def _descent(
    correction: _Correction, x: Tensor, wanted: Tensor
) -> Callable[[DifferentiableModel], None]:
    """Adds the gradients of the cross entropy, which is the divergence and a constant."""

    def work(model: DifferentiableModel) -> None:
        loss = functional.cross_entropy(model.unembed(correction(x)), wanted)
        loss.backward()  # type: ignore[no-untyped-call]

    return work
