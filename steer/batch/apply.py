"""The plain torch form: runs anywhere, and is the reference for every other form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.batch.tables import TableView
from steer.edits import (
    CarriedReads,
    beyond,
    channel_changes,
    elsewhere,
    overflow_shown,
    part_way,
    rescaled,
    told_of,
)
from steer.laws import Lengths, activations, coefficients, squares_in_plane


def read_table(
    view: TableView,
    x: Float[Tensor, "T d"],
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"] | None = None,
) -> CarriedReads:
    """What the edits of `view` read of each token of `x`; with `solo`, each of its one token."""
    x = x.float()
    lengths = Lengths.of(x, view.laws.traits)
    return _read(view, x, lengths, slots, solo)


def apply_table(
    view: TableView,
    x: Float[Tensor, "T d"],
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"] | None = None,
    readings: CarriedReads | None = None,
    factors: Float[Tensor, " T"] | None = None,
) -> Float[Tensor, "T d"]:
    """x with each token's block applied; a token whose slot is 0 is returned to the bit.

    `view` is that of the slots in `slots`, or of more. With nothing needed, constants are added.
    `solo` may be given where each slot of `view` is that of one token at most: the token of each
    row of the bank. `readings` are what a view that reads elsewhere has read there (`read_table`).
    Of what is changed a token gets as much as `factors` say, in front of any rescaling; at 1 the
    whole, to the bit.
    """
    needs = view.needs
    if not any(needs):
        shift = view.shift.index_select(0, slots)
        return (x.float() + (shift if factors is None else shift * factors[:, None])).to(x.dtype)
    before = after = x.float()
    lengths = Lengths.of(before, view.laws.traits)
    if needs.replacing:
        after = before.masked_fill(view.replace.index_select(0, slots)[:, None], 0.0)
    if view.shifting:
        after = after + view.shift.index_select(0, slots)
    if needs.mapping:
        after = after + channel_changes(before, view.channels.of(slots))
    if needs.edits:
        c = _coefficients(view, before, lengths, slots, solo, readings)
        if solo is None:
            after = torch.addmm(after, c, view.write)
        else:
            after = after.index_add(0, solo, c.T * view.write)
    if factors is not None:
        after = part_way(before, after, factors[:, None])
    if needs.preserving:
        preserved = view.preserve.index_select(0, slots)[:, None]
        norms = before.norm(dim=-1, keepdim=True) if lengths.norm is None else lengths.norm
        after = rescaled(after, norms, preserved)
    if needs.choosing:
        after = torch.where(beyond(before, view.sides.of(slots)), after, before)
    return torch.where((slots != 0)[:, None], overflow_shown(after).to(x.dtype), x)


def _coefficients(
    view: TableView,
    x: Float[Tensor, "T d"],
    lengths: Lengths,
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"] | None,
    readings: CarriedReads | None,
) -> Float[Tensor, "T K"]:
    """c_k of the bank rows for each token, 0 where a row belongs to another slot; `[1, K]` for
    `solo`, T times less arithmetic."""
    if view.reads_at is None:
        values, here = _read(view, x, lengths, slots, solo)
    else:
        values, there = elsewhere(readings, view.reads_at)
        here = _of_each(lengths, solo).read_at(there, view.laws)
    c = coefficients(values, view.laws, here)
    owned = slots[:, None] if solo is None else slots.index_select(0, solo)[None]
    return c.masked_fill(view.owner != owned, 0.0)


def _read(
    view: TableView,
    x: Float[Tensor, "T d"],
    lengths: Lengths,
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"] | None,
) -> CarriedReads:
    """u of the bank rows for each token; for `solo`, of each row for its one token."""
    if solo is None:
        products = x @ view.read.T
    else:
        products = (x.index_select(0, solo) * view.read).sum(-1)[None]
    if view.laws.traits.planar:
        lengths = lengths._replace(plane=_lengths_in_plane(view, products, slots, solo))
    told = told_of(x, len(view.laws), view.encoders)
    if told is not None and solo is not None:
        told = told.of_one_token(solo)
    lengths = _of_each(lengths, solo)
    return CarriedReads(activations(products, view.laws, lengths, told), lengths)


def _lengths_in_plane(
    view: TableView,
    products: Float[Tensor, "T K"],
    slots: Int[Tensor, " T"],
    solo: Int[Tensor, " K"] | None,
) -> Float[Tensor, "T 1"]:
    """The length of each token in the plane that its slot's edits read."""
    squares = squares_in_plane(products, view.laws)
    if solo is not None:
        return squares.new_zeros(len(slots)).index_add(0, solo, squares[0]).sqrt()[:, None]
    squares = squares.masked_fill(view.owner != slots[:, None], 0.0)
    return squares.sum(-1, keepdim=True).sqrt()


def _of_each(lengths: Lengths, solo: Int[Tensor, " K"] | None) -> Lengths:
    """The lengths `[T, 1]` of all tokens, or those of the tokens of `solo`, `[1, K]`."""
    if solo is None:
        return lengths
    return Lengths(*(None if one is None else one.index_select(0, solo).T for one in lengths))
