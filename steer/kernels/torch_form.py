"""The plain torch form: runs anywhere, and is the reference for every other form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.edits import coefficients, rescaled
from steer.tables import Stage


def apply_stage(
    stage: Stage,
    x: Float[Tensor, "T d"],
    slots: Int[Tensor, " T"],
    *,
    shifts_only: bool = False,
) -> Float[Tensor, "T d"]:
    """x with each token's block applied; a token whose slot is 0 is returned to the bit.

    `shifts_only` promises that every slot named in `slots` only adds a constant.
    """
    if shifts_only:
        return (x.float() + stage.shift.index_select(0, slots)).to(x.dtype)
    before = x.float()
    norms = before.norm(dim=-1, keepdim=True)
    replaced = stage.replace.index_select(0, slots)[:, None]
    after = before.masked_fill(replaced, 0.0) + stage.shift.index_select(0, slots)
    if stage.bank_rows:
        after = after + _bank(stage, before, norms, slots)
    preserved = stage.preserve.index_select(0, slots)[:, None]
    after = torch.where(preserved, rescaled(after, norms), after)
    return torch.where((slots != 0)[:, None], after.to(x.dtype), x)


def _bank(
    stage: Stage,
    x: Float[Tensor, "T d"],
    norms: Float[Tensor, "T 1"],
    slots: Int[Tensor, " T"],
) -> Float[Tensor, "T d"]:
    """Σ c_k(⟨r_k, x⟩) w_k over the bank rows that belong to each token's slot."""
    rows = stage.bank_rows
    cutoff = None
    if stage.competitions:
        columns = [x.new_full((len(x), 1), float("-inf"))]
        columns += [contest.cutoff(x) for _, contest in stage.competitions.values()]
        cutoff = torch.cat(columns, dim=1).index_select(1, stage.contest[:rows])
    c = coefficients(x @ stage.read[:rows].T, stage.laws[:rows], norms, cutoff)
    c = c.masked_fill(stage.owner[:rows] != slots[:, None], 0.0)
    return c @ stage.write[:rows]
