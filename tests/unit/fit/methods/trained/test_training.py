"""What training says of itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer.fit.methods.trained.training import train

ENGINE: Any = SimpleNamespace(
    capabilities=SimpleNamespace(gradients=True), differentiate=lambda work: work(None)
)
ROWS = [1.0, 2.0, 3.0, 4.0, 5.0]


def trained(rate: float, *, maximize: bool = False, **options: Any) -> tuple[Any, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(()))

    def loss(_model: Any, rows: list[float]) -> Tensor:
        return (weight - torch.tensor(rows)).square().mean()

    optimiser = torch.optim.SGD([weight], lr=rate, maximize=maximize)
    found = train(
        ENGINE, ROWS, loss, optimiser, what="a test", steps=20, batch=2, seed=0, **options
    )
    return found, weight


def test_losses_are_of_all_rows_before_and_after() -> None:
    """However unlike the batches are, of which the last is the shorter."""
    found, weight = trained(0.1)
    assert found.before == pytest.approx(11.0)
    assert found.after == pytest.approx(2.0 + (float(weight.detach()) - 3.0) ** 2)


def test_what_does_not_train_says_so() -> None:
    found, _ = trained(0.01, maximize=True)
    assert found.after > found.before


def test_another_loss_may_judge() -> None:
    found, weight = trained(0.1, judged=lambda _model, rows: torch.tensor(float(len(rows))))
    assert found.told() == {"loss_before": 1.8, "loss_after": 1.8}
    assert float(weight.detach()) > 1.0


def test_many_rows_are_judged_by_a_few_of_all() -> None:
    seen: list[float] = []

    def judge(_model: Any, rows: list[float]) -> Tensor:
        seen.extend(rows)
        return torch.zeros(())

    weight = nn.Parameter(torch.zeros(()))
    rows = [float(n) for n in range(1000)]
    train(
        ENGINE,
        rows,
        lambda _model, _rows: weight.square(),
        torch.optim.SGD([weight], lr=0.1),
        what="a test",
        steps=1,
        batch=8,
        seed=0,
        judged=judge,
    )
    first = seen[: len(seen) // 2]
    assert seen == first * 2
    assert len(first) <= 48
    assert max(first) > 900
