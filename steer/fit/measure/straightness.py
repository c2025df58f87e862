"""How straight a dose-response is: R² of a line, and the straightness of a path (2406.11624)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def r_squared(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The share of the variance of `y` that its least-squares line over `x` explains; None where
    one of them does not vary."""
    a = torch.tensor(x, dtype=torch.float64)
    b = torch.tensor(y, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    total = float(a @ a) * float(b @ b)
    return None if total == 0 else float(a @ b) ** 2 / total


def straightness(path: Float[Tensor, "N k"]) -> float | None:
    """S = ‖p_N − p₀‖ / Σ‖Δp‖: 1 for a straight path, less for any detour; None for a path of
    length 0."""
    path = path.double()
    length = float(path.diff(dim=0).norm(dim=-1).sum())
    return None if length == 0 else float((path[-1] - path[0]).norm()) / length


def curve_straightness(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The straightness of the curve (x, y), each scaled to its range so that units do not count:
    1 for a line, down to 1/√2 for a monotone step, less where the curve turns back."""
    columns = [torch.tensor(values, dtype=torch.float64) for values in (x, y)]
    ranges = [float(column.max() - column.min()) for column in columns]
    if 0 in ranges:
        return None
    return straightness(
        torch.stack([column / span for column, span in zip(columns, ranges, strict=True)], dim=-1)
    )
