"""The plain torch form: runs anywhere, and is the reference for every other form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.edits import coefficients, rescaled
from steer.tables import EVERYTHING, Needs, Stage


def apply_stage(
    stage: Stage,
    x: Float[Tensor, "T d"],
    slots: Int[Tensor, " T"],
    needs: Needs = EVERYTHING,
) -> Float[Tensor, "T d"]:
    """x with each token's block applied; a token whose slot is 0 is returned to the bit.

    What `needs` leaves out, no block of `slots` does; with nothing needed, constants are added.
    """
    shift = stage.shift.index_select(0, slots)
    if not any(needs):
        return (x.float() + shift).to(x.dtype)
    before = after = x.float()
    norms = before.norm(dim=-1, keepdim=True)
    if needs.replacing:
        after = before.masked_fill(stage.replace.index_select(0, slots)[:, None], 0.0)
    after = after + shift
    if needs.edits and stage.bank_rows:
        after = after + _bank(stage, before, norms, slots)
    if needs.preserving:
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
