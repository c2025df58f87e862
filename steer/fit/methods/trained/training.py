"""Gradient descent beside serving: each step is one piece of work between two of the engine's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.errors import SteerError
from steer.fit.methods.bookmark import (
    Bookmark,
    FallingRates,
    resume_training,
    training_state,
)
from steer.fit.states import Progress

Row = TypeVar("Row")
Loss: TypeAlias = Callable[[DifferentiableModel, list[Row]], Tensor]
"""The loss of one batch of rows."""
_WATCHED = 48
"""Rows at most on which the loss is taken before and after."""


@dataclass(frozen=True)
class Losses:
    """The mean loss of the same rows before training and after it."""

    before: float
    after: float

    def told(self) -> dict[str, float]:
        """For a card."""
        return {"loss_before": round(self.before, 4), "loss_after": round(self.after, 4)}


def train(
    engine: Engine,
    rows: Sequence[Row],
    loss: Loss[Row],
    optimiser: torch.optim.Optimizer,
    *,
    what: Any,
    steps: int,
    batch: int,
    seed: int,
    judged: Loss[Row] | None = None,
    drawn: Callable[[], object] | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Lowers `loss` over `steps` batches of `rows`, the rates falling to 0 in a line.

    What it came to, by `judged` (default: `loss`) on the same rows before and after: batches differ
    by more than what training does to them, and so does a loss that draws. Other requests go on
    between steps; `progress` is told of each.

    `what`, plain values, is all that the rows and the loss depend on: training of the same that was
    ended goes on from its bookmark, to the same bits. A loss that draws takes from `drawn` once in
    each step.
    """
    watched = rows[:: -(-len(rows) // _WATCHED)]
    parts = [watched[first : first + batch] for first in range(0, len(watched), batch)]

    def mean_loss() -> float:
        found = [
            len(part) * differentiable(engine).differentiate(_judged(list(part), judged or loss))
            for part in parts
        ]
        return sum(found) / len(watched)

    bookmark = Bookmark(engine, [what, steps, batch, seed])
    rates, kept = FallingRates(optimiser, steps), bookmark.read()
    before = float(kept["before"]) if kept else mean_loss()
    begun = int(kept["done"]) if kept else 0
    if kept:
        resume_training(optimiser, kept)
        if progress is not None:
            progress(begun)
    for step, chosen in zip(range(steps), batches(rows, batch, seed), strict=False):
        if step < begun:
            if drawn is not None:
                drawn()
            continue
        rates.at(step)
        differentiable(engine).differentiate(_step(chosen, loss, optimiser))
        bookmark.write(partial(_kept, optimiser, step + 1, before))
        if progress is not None:
            progress(1)
    return Losses(before, mean_loss())


def _kept(optimiser: torch.optim.Optimizer, done: int, before: float) -> dict[str, Tensor]:
    return {
        "done": torch.tensor(done),
        "before": torch.tensor(before, dtype=torch.float64),
        **training_state(optimiser),
    }


def _judged(rows: list[Row], loss: Loss[Row]) -> Callable[[DifferentiableModel], float]:
    def work(model: DifferentiableModel) -> float:
        with torch.no_grad():
            return float(loss(model, rows))

    return work


def _step(
    rows: list[Row], loss: Loss[Row], optimiser: torch.optim.Optimizer
) -> Callable[[DifferentiableModel], None]:
    def work(model: DifferentiableModel) -> None:
        optimiser.zero_grad()
        loss(model, rows).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

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
