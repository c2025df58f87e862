"""The plain torch form: runs anywhere, and is the reference for every other form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.batch.tables import TableView
from steer.edits import (
    Lengths,
    beyond,
    channel_changes,
    coefficients,
    overflow_shown,
    rescaled,
    squares_in_plane,
)


def apply_table(
    view: TableView,
    x: Float[Tensor, "T d"],
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"] | None = None,
) -> Float[Tensor, "T d"]:
    """x with each token's block applied; a token whose slot is 0 is returned to the bit.

    `view` is that of the slots in `slots`, or of more. With nothing needed, constants are added.
    `solo` may be given where each slot of `view` is that of one token at most: the token of each
    row of the bank.
    """
    needs = view.needs
    if not any(needs):
        return (x.float() + view.shift.index_select(0, slots)).to(x.dtype)
    before = after = x.float()
    lengths = Lengths.of(before, view.traits)
    if needs.replacing:
        after = before.masked_fill(view.replace.index_select(0, slots)[:, None], 0.0)
    if view.shifting:
        after = after + view.shift.index_select(0, slots)
    if needs.mapping:
        after = after + channel_changes(before, view.channels.of(slots))
    if needs.edits and solo is not None:
        after = after.index_add(0, solo, _solo(view, before, lengths, slots, solo))
    elif needs.edits:
        after = after + _bank(view, before, lengths, slots)
    if needs.preserving:
        preserved = view.preserve.index_select(0, slots)[:, None]
        norms = before.norm(dim=-1, keepdim=True) if lengths.norm is None else lengths.norm
        after = torch.where(preserved, rescaled(after, norms), after)
    if needs.choosing:
        after = torch.where(beyond(before, view.sides.of(slots)), after, before)
    return torch.where((slots != 0)[:, None], overflow_shown(after).to(x.dtype), x)


def _bank(
    view: TableView,
    x: Float[Tensor, "T d"],
    lengths: Lengths,
    slots: Int[Tensor, " T"],
) -> Float[Tensor, "T d"]:
    """Σ c_k(⟨r_k, x⟩) w_k over the bank rows that belong to each token's slot."""
    products = x @ view.read.T
    others = view.owner != slots[:, None]
    if view.traits.planar:
        squares = squares_in_plane(products, view.laws).masked_fill(others, 0.0)
        lengths = lengths._replace(plane=squares.sum(-1, keepdim=True).sqrt())
    c = coefficients(products, view.laws, lengths, _cutoffs(view, x), view.traits)
    return c.masked_fill(others, 0.0) @ view.write


def _solo(
    view: TableView,
    x: Float[Tensor, "T d"],
    lengths: Lengths,
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"],
) -> Float[Tensor, "K d"]:
    """The summands c_k(⟨r_k, x⟩) w_k of the bank rows k, each for its one token: T times less
    arithmetic than `_bank`, which multiplies every row with every token."""
    products = (x.index_select(0, solo) * view.read).sum(-1)[None]
    if view.traits.planar:
        squares = squares_in_plane(products, view.laws)[0]
        plane = squares.new_zeros(len(x)).index_add(0, solo, squares).sqrt()
        lengths = lengths._replace(plane=plane[:, None])
    lengths = Lengths(*(None if one is None else one.index_select(0, solo).T for one in lengths))
    cutoff = _cutoffs(view, x)
    if cutoff is not None:
        cutoff = cutoff.gather(0, solo[None])
    c = coefficients(products, view.laws, lengths, cutoff, view.traits)
    c = c.masked_fill(view.owner != slots.index_select(0, solo), 0.0)
    return c.T * view.write


def _cutoffs(view: TableView, x: Float[Tensor, "T d"]) -> Float[Tensor, "T K"] | None:
    """For each bank row the least pre-activation that counts as active; None without SAEs whose
    features compete."""
    if not view.cutoffs:
        return None
    columns = [x.new_full((len(x), 1), float("-inf"))]
    columns += [cutoff.least_active(x) for cutoff in view.cutoffs]
    return torch.cat(columns, dim=1).index_select(1, view.cutoff_column)
