"""The numbers that are read off states and logits, each formula once. float32 throughout.

T tokens, d the width of a state, k directions, features or tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_TINY = 1e-30
"""What keeps the division by a state's length finite."""


def norms(x: Float[Tensor, "T d"]) -> Float[Tensor, " T"]:
    """‖x‖ of each state."""
    return x.float().norm(dim=-1)


def unit(direction: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """A vector's direction, of length one."""
    return direction.float() / direction.float().norm()


def projections(
    x: Float[Tensor, "T d"], units: Float[Tensor, "k d"]
) -> Float[Tensor, "T k"]:
    """⟨x, v̂⟩ along each of `units`, in units of the stream."""
    return x.float() @ units.T


def cosines(
    along: Float[Tensor, "T k"], lengths: Float[Tensor, " T"]
) -> Float[Tensor, "T k"]:
    """The cosines of states whose projections and norms are these; a state of norm 0 points
    nowhere, and its cosine with anything is 0."""
    return along / lengths.clamp_min(_TINY)[:, None]


class Ranked(NamedTuple):
    """The k largest numbers of each row, largest first, and where they stand."""

    values: Float[Tensor, "T k"]
    places: Int[Tensor, "T k"]


def ranked(numbers: Float[Tensor, "T n"], k: int) -> Ranked:
    """The `k` largest of each row, all of them where there are fewer."""
    best = numbers.topk(min(k, numbers.shape[-1]), dim=-1)
    return Ranked(best.values, best.indices)


def likeliest(logits: Float[Tensor, "T vocab"], k: int) -> Ranked:
    """The `k` likeliest tokens of each row, with their probabilities."""
    return ranked(logits.float().softmax(-1), k)


def entropies(logits: Float[Tensor, "T vocab"]) -> Float[Tensor, " T"]:
    """The entropy of each row's distribution, in nats."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def divergences(
    logits: Float[Tensor, "T vocab"], others: Float[Tensor, "T vocab"]
) -> Float[Tensor, " T"]:
    """KL(p‖q) of the distributions of `logits` from those of `others`, in nats."""
    p, q = logits.float().log_softmax(-1), others.float().log_softmax(-1)
    # A token of probability 0 adds nothing, also where its logit is −∞ in both.
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
