"""The plain torch form: runs anywhere, and is the reference for every other form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.edits import coefficients, rescaled
from steer.tables import Part


def apply_stage(
    part: Part,
    x: Float[Tensor, "T d"],
    slots: Int[Tensor, " T"],
) -> Float[Tensor, "T d"]:
    """x with each token's block applied; a token whose slot is 0 is returned to the bit.

    `part` is that of the slots in `slots`, or of more. With nothing needed, constants are added.
    """
    needs = part.needs
    shift = part.shift.index_select(0, slots)
    if not any(needs):
        return (x.float() + shift).to(x.dtype)
    before = after = x.float()
    norms = before.norm(dim=-1, keepdim=True)
    if needs.replacing:
        after = before.masked_fill(part.replace.index_select(0, slots)[:, None], 0.0)
    after = after + shift
    if needs.edits:
        after = after + _bank(part, before, norms, slots)
    if needs.preserving:
        preserved = part.preserve.index_select(0, slots)[:, None]
        after = torch.where(preserved, rescaled(after, norms), after)
    return torch.where((slots != 0)[:, None], after.to(x.dtype), x)


def _bank(
    part: Part,
    x: Float[Tensor, "T d"],
    norms: Float[Tensor, "T 1"],
    slots: Int[Tensor, " T"],
) -> Float[Tensor, "T d"]:
    """Σ c_k(⟨r_k, x⟩) w_k over the bank rows that belong to each token's slot."""
    cutoff = None
    if part.competitions:
        columns = [x.new_full((len(x), 1), float("-inf"))]
        columns += [contest.cutoff(x) for contest in part.competitions]
        cutoff = torch.cat(columns, dim=1).index_select(1, part.contest)
    c = coefficients(x @ part.read.T, part.laws, norms, cutoff)
    c = c.masked_fill(part.owner != slots[:, None], 0.0)
    return c @ part.write
