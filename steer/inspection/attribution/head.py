"""From the last block to the logits as a linear function, the norm held at one state's scale.

What an engine offers is `unembed`: states to logits, with norm, output matrix, scale, bias and soft
cap inside. All that is needed follows from what it answers:

- A norm divides by a state's size, its root mean square or, where it centres, its deviation. Over
  states of one size it divides by one number, and what remains is affine. Which of the two it is
  shows in whether two states' logits add up to those of their sum, all three made equally large.
- A soft cap, cap·tanh(z/cap), is inverted; it is looked for where no size makes the logits add up,
  and is the number with which they do.
- The direction of a token is then read channel by channel, at states as large as the one in
  question.

A head that is not of this form, such as one with an activation, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from steer.engines.base import Engine
from steer.errors import Unsupported

_TOLERANCE = 1e-4
_TOLERANCE_HALF = 3e-2
"""By how much logits may fail to add up, relative to their spread, in 32 bits and in 16."""

_BETTER = 8.0
"""So much better must a capped head explain the logits than one without, to be believed."""

_LOGITS_AT_ONCE = 1 << 24
"""Logits computed at a time: 64 MiB of float32, whatever the vocabulary."""

Size: TypeAlias = Callable[[Tensor], Tensor]


def _root_mean_square(x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
    size: Tensor = x.pow(2).mean(-1, keepdim=True).sqrt()
    return size


def _deviation(x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
    return _root_mean_square(x - x.mean(-1, keepdim=True))


_SIZES: tuple[Size, ...] = (_root_mean_square, _deviation)


@dataclass(frozen=True)
class LinearHead:
    """`constant` + ⟨`directions`, x⟩ is the logit of each token of `tokens` at the state x that it
    was made for, before `cap`; a component of x gives its product with the direction.

    All float64: `directions` `[tokens, d_model]`, the others `[tokens]`. `logits` are the model's
    own at x, after the cap; `uncapped` the same before it.
    """

    tokens: tuple[int, ...]
    directions: Float[Tensor, "tokens d_model"]
    constant: Float[Tensor, " tokens"]
    logits: Float[Tensor, " tokens"]
    uncapped: Float[Tensor, " tokens"]
    cap: float | None


def linear_head(
    engine: Engine, state: Float[Tensor, " d_model"], tokens: Sequence[int]
) -> LinearHead:
    """The head of `engine`'s model for `tokens`, at the size of `state`, a last block's output.

    Raises `Unsupported` (`unsupported_inspection`) for a head that is no such function.
    """
    x = state.double().cpu()
    size, cap = head_form(engine, x)
    kept = list(tokens)
    own, nothing = read_logits(engine, torch.stack([x, torch.zeros_like(x)]), kept)
    uncapped, constant = uncapped_logits(own, cap), uncapped_logits(nothing, cap)
    # Moved away from zero in its own channel, so that no state is close to none at all.
    length = x.norm()
    signs = torch.where(x < 0, -1.0, 1.0).double()
    moved = x + torch.diag(signs * length)
    shares = size(x) / size(moved)
    read = uncapped_logits(read_logits(engine, moved * shares, kept), cap)
    directions = ((read - constant) / shares - (uncapped - constant)) / (signs[:, None] * length)
    return LinearHead(tuple(tokens), directions.T.contiguous(), constant, own, uncapped, cap)


def head_form(engine: Engine, x: Float[Tensor, " d_model"]) -> tuple[Size, float | None]:
    """What the norm divides by, and the soft cap, if any."""
    best: tuple[float, Size, float | None] | None = None
    for size in _SIZES:
        if not size(x) > 0:
            continue
        # Another state of the same size, whatever that is: the same channels in another order.
        other = x.roll(1)
        share = size(x) / size(x + other).clamp_min(1e-30)
        states = torch.stack([x, other, (x + other) * share, torch.zeros_like(x)])
        error = _Mismatch(read_logits(engine, states), float(share))
        cap = error.best_cap()
        plain, capped = error(None), error(cap)
        found = (capped, size, cap) if capped * _BETTER < plain else (plain, size, None)
        if best is None or found[0] * _BETTER < best[0]:
            best = found
    single = engine.info.dtype in ("float32", "float64")
    if best is None or not best[0] <= (_TOLERANCE if single else _TOLERANCE_HALF):
        raise Unsupported(
            f"the logits of {engine.info.name!r} are no linear function of its normed last state, "
            "so that no part of that state has a share of its own in them: read single layers with "
            "the logit lens",
            code="unsupported_inspection",
        )
    return best[1], best[2]


@dataclass(frozen=True)
class _Mismatch:
    """By how much the logits of two states do not give those of their sum, by the cap.

    `logits` `[4, vocab]` are those of two states, of `share` times their sum, and of no state.
    """

    logits: Float[Tensor, "4 vocab"]
    share: float

    def __call__(self, cap: float | None) -> float:
        one, other, both, nothing = uncapped_logits(self.logits, cap)
        error = both - self.share * (one + other) - (1 - 2 * self.share) * nothing
        spread = (both - both.mean()).norm()
        return float(error.norm() / spread.clamp_min(1e-30))

    def best_cap(self) -> float:
        largest = float(self.logits.abs().max())
        low, high = (torch.tensor([1.0 + 1e-6, 64.0]).double() * max(largest, 1e-6)).log().tolist()
        grid = torch.linspace(low, high, 65).double().exp().tolist()
        place = min(range(len(grid)), key=lambda n: self(grid[n]))
        ends = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
        found = minimize_scalar(self, bounds=ends, method="bounded", options={"xatol": 1e-9})
        return float(found.x)


def uncapped_logits(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.atanh((logits / cap).clamp(-1, 1))


def read_logits(
    engine: Engine, states: Float[Tensor, "N d_model"], tokens: Sequence[int] | None = None
) -> Float[Tensor, "N tokens"]:
    """Logits of `states` in float64, of `tokens` or of all, a bounded number at a time."""
    rows = max(1, _LOGITS_AT_ONCE // engine.info.vocab_size)
    parts = []
    for part in torch.split(states.float(), rows):
        logits = engine.unembed(part).cpu()
        parts.append((logits if tokens is None else logits[:, list(tokens)]).double())
    return torch.cat(parts)
