"""Gradient descent beside serving: each step is one piece of work between two of the engine's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.errors import SteerError
from steer.fit.states import Progress

Row = TypeVar("Row")
Loss: TypeAlias = Callable[[DifferentiableModel, list[Row]], Tensor]
"""The loss of one batch of rows."""


def train(
    engine: Engine,
    rows: Sequence[Row],
    loss: Loss[Row],
    optimiser: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
    seed: int,
    progress: Progress | None = None,
) -> list[float]:
    """Lowers `loss` over `steps` batches of `rows`, the rates falling to 0 in a line.

    The loss of every step. Other requests go on between steps; `progress` is told of each.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    losses = []
    for _, chosen in zip(range(steps), batches(rows, batch, seed), strict=False):
        losses.append(differentiable(engine).differentiate(_step(chosen, loss, optimiser)))
        schedule.step()
        if progress is not None:
            progress(1)
    return losses


def _step(
    rows: list[Row], loss: Loss[Row], optimiser: torch.optim.Optimizer
) -> Callable[[DifferentiableModel], float]:
    def work(model: DifferentiableModel) -> float:
        optimiser.zero_grad()
        found = loss(model, rows)
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return float(found.detach())

    return work


def batches(rows: Sequence[Row], batch: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end; every row once in each turn through the data."""
    order = list(rows)
    draw = random.Random(seed)
    while True:
        draw.shuffle(order)
        for first in range(0, len(order), batch):
            yield order[first : first + batch]


def check_training(steps: int, batch: int) -> None:
    """Raises `SteerError` unless there is something to do."""
    if steps < 1 or batch < 1:
        raise SteerError(
            f"steps ({steps!r}) and batch ({batch!r}) must be at least 1", code="invalid_option"
        )


def told_losses(losses: Sequence[float]) -> dict[str, float]:
    """The first loss, and the mean of the last ten, for a card."""
    last = losses[-10:]
    return {"first_loss": round(losses[0], 4), "last_loss": round(sum(last) / len(last), 4)}
