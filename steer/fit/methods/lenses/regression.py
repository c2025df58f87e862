"""The affine map nearest to taking one layer's states to the last one's, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Translator:
    """x + W x + b, float32: `weight` is W `[d, d]`, `bias` is b `[d]`.

    `mean` `[d]` and the lower triangle `factor` `[d, d]` describe the inputs it was fitted on: the
    states (x − mean) factor⁻ᵀ have unit covariance. `spread` `[d]` is the standard deviation of
    what it should give.
    """

    weight: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "d d"]
    spread: Float[Tensor, " d"]


class Regression:
    """Least squares from x to y over a stream of rows, with a ridge that pulls towards y = x.

    A row counts with 1/‖y‖², because the norm before the output matrix takes the length away: a
    state a hundred times as long, such as the first token's in many models, counts as one.

    Assumes: x and y are float32 `[n, d]`. Memory: 2·d² floats in float64.
    """

    def __init__(self, width: int) -> None:
        self._count = 0.0
        # What is far from 0 in every state would leave little of a variance: it is taken off first.
        self._origin: tuple[Tensor, Tensor] | None = None
        self._x, self._y, self._squares = torch.zeros(3, width, dtype=torch.float64)
        self._gram, self._cross = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> None:
        """Takes n rows."""
        if self._origin is None:
            self._origin = (x.mean(0), y.mean(0))
        shares = y.norm(dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()
        a, b = ((rows - at) * shares for rows, at in zip((x, y), self._origin, strict=True))
        self._count += float(shares.double().pow(2).sum())
        self._x += (a * shares).double().sum(0)
        self._y += (b * shares).double().sum(0)
        self._squares += b.double().pow(2).sum(0)
        self._gram += (a.T @ a).double()
        self._cross += (a.T @ b).double()

    def state(self) -> dict[str, Tensor]:
        """All that was taken, which `Regression.of` takes up again; nothing before the first."""
        if self._origin is None:
            return {}
        x, y = self._origin
        return {
            "count": torch.tensor(self._count, dtype=torch.float64),
            "origin": torch.stack([x, y]),
            "sums": torch.stack([self._x, self._y, self._squares]),
            "products": torch.stack([self._gram, self._cross]),
        }

    @staticmethod
    def of(state: Mapping[str, Tensor], width: int) -> Regression:
        """One that goes on from `state`."""
        found = Regression(width)
        if state:
            x, y = state["origin"]
            found._count, found._origin = float(state["count"]), (x, y)
            found._x, found._y, found._squares = state["sums"]
            found._gram, found._cross = state["products"]
        return found

    def solve(self, penalty: float) -> Translator:
        """The map under a ridge of `penalty` times each input's own variance."""
        assert self._origin is not None, "nothing was added"
        x, y = self._x / self._count, self._y / self._count
        covariance = self._gram / self._count - x.outer(x)
        cross = self._cross / self._count - x.outer(y)
        variance = covariance.diagonal()
        # An input that never moves has no variance, and would leave the matrix singular.
        price = penalty * variance + 1e-9 * variance.mean().clamp_min(1e-30)
        factor = torch.linalg.cholesky(covariance + torch.diag(price))
        weight = torch.cholesky_solve(cross - covariance, factor).T
        mean, last = (at.double() + by for at, by in zip(self._origin, (x, y), strict=True))
        spread = (self._squares / self._count - y.pow(2)).clamp_min(0).sqrt()
        bias = last - mean - weight @ mean
        return Translator(*(part.float() for part in (weight, bias, mean, factor, spread)))
