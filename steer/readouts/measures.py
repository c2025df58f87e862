"""The numbers that are read off states and logits, each formula once. float32 throughout.

T tokens, d the width of a state, k directions, features or tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LONG, _PART = 4096, 64
"""From this length on rows are ranked by parts of this length, where they have many for each number
that is asked for."""
_TINY = 1e-30
"""What keeps the division by a state's length finite."""


def norms(x: Float[Tensor, "T d"]) -> Float[Tensor, " T"]:
    """‖x‖ of each state."""
    lengths: Tensor = x.float().norm(dim=-1)
    return lengths


def unit(direction: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """A vector's direction, of length one."""
    length: Tensor = direction.float().norm()
    return direction.float() / length


def projections(x: Float[Tensor, "T d"], units: Float[Tensor, "k d"]) -> Float[Tensor, "T k"]:
    """⟨x, v̂⟩ along each of `units`, in units of the stream."""
    return x.float() @ units.T


def affine_scores(
    x: Float[Tensor, "T d"], weights: Float[Tensor, " d"], bias: float
) -> Float[Tensor, " T"]:
    """⟨w, x⟩ + b of each state."""
    # As a sum of each row by itself: how many rows there are beside it changes no bit of it.
    scores: Tensor = (x.float() * weights).sum(-1) + bias
    return scores


def cosines(along: Float[Tensor, "T k"], lengths: Float[Tensor, " T"]) -> Float[Tensor, "T k"]:
    """The cosines of states whose projections and norms are these; a state of norm 0 points
    nowhere, and its cosine with anything is 0."""
    return along / lengths.clamp_min(_TINY)[:, None]


class Ranked(NamedTuple):
    """The k largest numbers of each row, largest first, and where they stand."""

    values: Float[Tensor, "T k"]
    places: Int[Tensor, "T k"]


def ranked(numbers: Float[Tensor, "T n"], k: int) -> Ranked:
    """The `k` largest of each row, all of them where there are fewer; NaN is larger than all."""
    long = numbers.shape[-1] >= max(_LONG, 4 * k * _PART)
    # By its length alone, so that a row's order among equals is the same in any batch.
    if long and numbers.device.type == "cpu":
        return _ranked_by_parts(numbers, k)
    best = numbers.topk(min(k, numbers.shape[-1]), dim=-1)
    return Ranked(best.values, best.indices)


def _ranked_by_parts(numbers: Float[Tensor, "T n"], k: int) -> Ranked:
    """`ranked` of long rows: what is among the k largest lies in one of the k parts whose largest
    number is largest, or in the shorter part at the end. On a CPU several times as fast."""
    whole = numbers.shape[-1] // _PART * _PART
    parts, rest = numbers[:, :whole].reshape(len(numbers), -1, _PART), numbers[:, whole:]
    chosen = parts.amax(-1).topk(k, dim=-1).indices
    among = parts.gather(1, chosen[..., None].expand(-1, -1, _PART)).flatten(1)
    best = torch.cat([among, rest], dim=-1).topk(k, dim=-1)
    part, within = best.indices // _PART, best.indices % _PART
    inside = chosen.gather(-1, part.clamp(max=k - 1)) * _PART + within
    at_end = best.indices - k * _PART + whole
    return Ranked(best.values, torch.where(part < k, inside, at_end))


def likeliest(logits: Float[Tensor, "T vocab"], k: int) -> Ranked:
    """The `k` likeliest tokens of each row, with their probabilities."""
    return predicted(logits, k).likeliest


def entropies(logits: Float[Tensor, "T vocab"]) -> Float[Tensor, " T"]:
    """The entropy of each row's distribution, in nats."""
    return predicted(logits, 1).entropies


class Predicted(NamedTuple):
    """The likeliest tokens of each row with their probabilities, and its entropy in nats."""

    likeliest: Ranked
    entropies: Float[Tensor, " T"]


def predicted(logits: Float[Tensor, "T vocab"], k: int) -> Predicted:
    """What each row's distribution says, of one exponential for each logit.

    log Σeᶻ − Σ eᶻz / Σeᶻ for z the logits less the row's largest: what is nearly certain loses no
    digits.
    """
    best = ranked(logits.float(), k)
    largest = best.values[:, :1]
    # 0 · log 0 is 0: e⁻²⁰⁰ is 0 in float32, and so is its product with a finite number.
    below = (logits.float() - largest).clamp_(min=-200.0)
    weights = below.exp()
    total = weights.sum(-1, keepdim=True)
    mean: Tensor = weights.mul_(below).sum(-1) / total[:, 0]
    chances = (best.values - largest).exp() / total
    return Predicted(Ranked(chances, best.places), total[:, 0].log() - mean)


def kl_divergence(
    logits: Float[Tensor, "T vocab"],
    reference: Float[Tensor, "T vocab"],
    *,
    reference_total: Float[Tensor, " T"] | None = None,
) -> Float[Tensor, " T"]:
    """KL(p ‖ q) in nats, p and q the softmax of `logits` and `reference`; exact in float64.

    `reference_total` is `log_total(reference)`, for those who hold much against one reference.
    Σ p·(a − b) − log Σeᵃ + log Σeᵇ for logits a and b: one exponential for each number of p.
    """
    weights, total = _weighed(logits)
    apart = logits.double() - reference.double()
    # 0 · log 0 is 0: a token that p rules out adds nothing, whatever q says.
    apart.masked_fill_(weights == 0, 0.0)
    mean = torch.einsum("tv,tv->t", weights, apart) / weights.sum(-1)
    of_reference = log_total(reference) if reference_total is None else reference_total
    divergence: Tensor = mean - total + of_reference
    return divergence.clamp(min=0.0)


def log_total(logits: Float[Tensor, "T vocab"]) -> Float[Tensor, " T"]:
    """log Σ exp of each row, in float64."""
    return _weighed(logits)[1]


def _weighed(
    logits: Float[Tensor, "T vocab"],
) -> tuple[Float[Tensor, "T vocab"], Float[Tensor, " T"]]:
    """exp of each logit less the row's largest, and log Σ exp of the row, in float64."""
    rows = logits.double()
    top = rows.amax(-1, keepdim=True)
    weights = (rows - top).exp_()
    return weights, weights.sum(-1).log() + top.squeeze(-1)
