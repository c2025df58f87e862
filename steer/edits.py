"""The arithmetic of steering: one family of edits that every kind compiles to.

A block reads a residual row x once and writes once:

    x ← x + shift + gain ⊙ x + offset + Σ_k c_k(⟨r_k, x⟩) · w_k

with every scalar law c taken from one family (`steer/laws.py`). Gain and offset, a number for each
channel, act on the channels whose value is inside their bounds (`CHANNEL_ROWS`). Under a ramp a
token gets a share of the change (`part_way`).
A block may act only where x lies on one side of a row. It may read u at an earlier hook point of
the layer (`Block.reads_at`): x is then only added to. Where features compete, an `Encoder` says
which are active, or how much.

Dot products, norms and the sum are float32; the result is cast once. These two are the only places,
with `steer.batch.apply` and `steer.artefacts.sae`, where activations are computed with.

Shapes: T tokens, K edits, d the width of the hook point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.errors import EngineError, Unsupported
from steer.laws import (
    NO_TRAIT,
    TINY,
    Law,
    LawColumns,
    Lengths,
    Told,
    Traits,
    activations,
    coefficients,
    squares_in_plane,
)
from steer.model import HookPoint

CHANNEL_ROWS = GAIN, OFFSET, LOWER, UPPER = range(4)
"""The rows of a block's `channels`: x gets gain · x + offset where lower ≤ x ≤ upper."""


class Encoder(Protocol):
    """What is asked of an SAE where a feature's activation takes more of a token than the feature's
    own row: encoders of one `identity` are one, and are asked once for all edits of a batch.

    `gives_activations` is whether it tells the activations themselves; else the least absolute
    pre-activation that counts as active. `latents` are computed for each token, in kernels too
    where it `ranks` them.
    """

    @property
    def identity(self) -> str: ...
    @property
    def latents(self) -> int: ...
    @property
    def gives_activations(self) -> bool: ...
    @property
    def ranks(self) -> bool: ...

    def on(self, device: torch.device) -> Encoder:
        """The same, with its tensors on `device`."""

    def tell(self, x: Float[Tensor, "T d"], columns: Int[Tensor, " K"]) -> Float[Tensor, "T K"]:
        """What it says of K edits, which know by `columns` what of it is theirs."""


@dataclass(frozen=True)
class Block:
    """What one intervention does at one hook point. All tensors float32.

    `shift` `[d]` is added as it is; `read` and `write` `[K, d]` with `laws` `[K, 9]` are rank-1
    edits that all see the same x; `channels` `[4, d]` change each channel by itself
    (`CHANNEL_ROWS`); where `side` `[d]` is given, rows with ⟨side, x⟩ ≤ 0 are left alone; `replace`
    discards x and keeps the shift alone; `preserve_norm` rescales the result to ‖x‖.

    `encoder` is asked where features compete, `columns` are those of the edits in it. With
    `reads_at`, `read` is of the state at that hook point, as it is after all edits there.
    """

    shift: Float[Tensor, " d"] | None = None
    read: Float[Tensor, "K d"] | None = None
    write: Float[Tensor, "K d"] | None = None
    laws: Float[Tensor, "K 9"] | None = None
    channels: Float[Tensor, "4 d"] | None = None
    side: Float[Tensor, " d"] | None = None
    encoder: Encoder | None = None
    columns: tuple[int, ...] | None = None
    reads_at: HookPoint | None = None
    replace: bool = False
    preserve_norm: bool = False

    @staticmethod
    def of_edits(
        read: Float[Tensor, "K d"],
        write: Float[Tensor, "K d"],
        laws: Sequence[Law],
        *,
        encoder: Encoder | None = None,
        columns: Sequence[int] | None = None,
        reads_at: HookPoint | None = None,
    ) -> Block:
        """A block of simultaneous rank-1 edits; `columns` are 0 where there are none."""
        table = torch.tensor(laws, dtype=torch.float32)
        if encoder is not None:
            columns = (0,) * len(read) if columns is None else tuple(columns)
        return Block(
            read=read,
            write=write,
            laws=table,
            encoder=encoder,
            columns=None if columns is None else tuple(columns),
            reads_at=reads_at,
        )

    @cached_property
    def is_shift(self) -> bool:
        """Whether the block only adds a constant, so that neighbours may be fused into one row."""
        reads = any(part is not None for part in (self.read, self.channels, self.side))
        return not (reads or self.replace or self.preserve_norm)

    @cached_property
    def traits(self) -> Traits:
        """What any of its laws has."""
        return NO_TRAIT if self.laws is None else Traits.of(self.laws)

    @cached_property
    def law_columns(self) -> LawColumns:
        """Its laws as they are computed with. Assumes: it has edits."""
        assert self.laws is not None, "a block without edits has no laws"
        return LawColumns.of(self.laws, self.traits)

    @property
    def n_edits(self) -> int:
        return 0 if self.read is None else self.read.shape[0]

    @property
    def kept(self) -> int:
        """How many numbers of a token are kept from where they are read to where it is written:
        what each edit has read, and two lengths."""
        return 0 if self.reads_at is None else self.n_edits + 2

    def fused_with(self, later: Block) -> Block:
        """The one block that adds both constants."""
        if not (self.is_shift and later.is_shift) or self.shift is None or later.shift is None:
            raise Unsupported("only constant additions fuse")
        return Block(shift=self.shift + later.shift)


def relative_sizes(
    before: Float[Tensor, "T d"], after: Float[Tensor, "T d"]
) -> Float[Tensor, " T"]:
    """‖Δx‖/‖x‖ of what was done to each token, in float32."""
    tiny = torch.finfo(torch.float32).tiny
    lengths: Tensor = before.float().norm(dim=-1).clamp_min(tiny)
    changes: Tensor = (after.float() - before.float()).norm(dim=-1)
    return changes / lengths


class CarriedReads(NamedTuple):
    """What K edits have read of each token: u, `[T, K]`, or `[1, K]` where each edit has a token of
    its own; and the lengths of the state that it was read from."""

    values: Tensor
    lengths: Lengths


def channel_changes(
    x: Float[Tensor, "T d"], channels: Float[Tensor, "*T 4 d"]
) -> Float[Tensor, "T d"]:
    """What is added to each channel; −0.0 where its value is outside the bounds."""
    gain, offset, lower, upper = channels.unbind(-2)
    return torch.addcmul(offset, gain, x).masked_fill((x < lower) | (x > upper), -0.0)


def beyond(x: Float[Tensor, "T d"], side: Float[Tensor, "*T d"]) -> Bool[Tensor, "T 1"]:
    """Whether each row lies on the side that `side` points to; all do, if it is zero."""
    return ((x * side).sum(-1, keepdim=True) > 0) | ~side.any(-1, keepdim=True)


def rescaled(
    x: Float[Tensor, "T d"],
    norms: Float[Tensor, "T 1"],
    chosen: Bool[Tensor, "T 1"] | None = None,
) -> Float[Tensor, "T d"]:
    """x with its rows scaled to `norms`, or the `chosen` ones alone; a row too short to have a
    direction becomes zero."""
    lengths: Tensor = x.norm(dim=-1, keepdim=True)
    factors = norms / lengths.clamp_min(torch.finfo(x.dtype).tiny)
    factors = factors.masked_fill(factors.isinf(), 0.0)
    return x * (factors if chosen is None else torch.where(chosen, factors, 1.0))


def part_way(
    before: Float[Tensor, "T d"], after: Float[Tensor, "T d"], factors: Float[Tensor, "T 1"]
) -> Float[Tensor, "T d"]:
    """The state that lies `factors` of the way from `before` to `after`; at 1 that is `after`, to
    the bit."""
    return torch.where(factors == 1, after, before + factors * (after - before))


def overflow_shown(x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
    """x with NaN in the rows whose norm float32 cannot hold.

    A model's own norm would make zeros of such a row, and the answer would look like one; NaN
    reaches the logits of that row's request, where it is found. Constants need no such look: they
    are bounded when they are compiled (`steer.plan.checks`).
    """
    return x.masked_fill(~x.norm(dim=-1, keepdim=True).isfinite(), math.nan)


def apply(
    block: Block,
    x: Tensor,
    readings: CarriedReads | None = None,
    factors: Float[Tensor, " T"] | None = None,
) -> Tensor:
    """`block` applied to every row of `x` `[..., d]`, T in all; the result has the dtype of `x`.

    `readings` are what a block that reads elsewhere has read there (`read`). Of what is changed a
    row gets as much as `factors` say, in front of any rescaling; at 1 the whole, to the bit.
    """
    if block.is_shift and block.shift is not None:
        shift = block.shift
        if factors is not None:
            shift = (shift * factors[:, None]).reshape(x.shape)
        return (x.float() + shift).to(x.dtype)
    before = x.reshape(-1, x.shape[-1]).float()
    after = torch.zeros_like(before) if block.replace else before
    if block.shift is not None:
        after = after + block.shift
    if block.channels is not None:
        after = after + channel_changes(before, block.channels)
    if block.read is not None and block.write is not None and block.laws is not None:
        after = after + _changes(block, before, readings) @ block.write
    if factors is not None:
        after = part_way(before, after, factors[:, None])
    if block.preserve_norm:
        after = rescaled(after, before.norm(dim=-1, keepdim=True))
    if block.side is not None:
        after = torch.where(beyond(before, block.side), after, before)
    return overflow_shown(after).to(x.dtype).reshape(x.shape)


def read(block: Block, x: Tensor) -> CarriedReads:
    """What the edits of `block` read of every row of `x` `[..., d]`."""
    assert block.read is not None, "a block without edits reads nothing"
    state = x.reshape(-1, x.shape[-1]).float()
    laws, products = block.law_columns, state @ block.read.T
    lengths = Lengths.of(state, laws.traits)
    if laws.traits.planar:
        plane = squares_in_plane(products, laws).sum(-1, keepdim=True).sqrt()
        lengths = lengths._replace(plane=plane)
    told = None
    if block.encoder is not None:
        columns = torch.tensor(block.columns, device=state.device)
        told = told_of(state, len(laws), [EncoderUse(block.encoder, slice(None), columns)])
    return CarriedReads(activations(products, laws, lengths, told), lengths)


def _changes(
    block: Block, before: Float[Tensor, "T d"], readings: CarriedReads | None
) -> Float[Tensor, "T K"]:
    """The coefficients of a block's edits."""
    laws = block.law_columns
    if block.reads_at is None:
        values, lengths = read(block, before)
    else:
        values, there = elsewhere(readings, block.reads_at)
        lengths = Lengths.of(before, laws.traits).read_at(there, laws)
    return coefficients(values, laws, lengths)


def elsewhere(readings: CarriedReads | None, point: HookPoint) -> CarriedReads:
    """`readings`, which are there; raises `EngineError` where the state at `point` comes later."""
    if readings is None:
        raise EngineError(
            f"the forward pass did not reach {point} before what is read there is written: the "
            "edits were not applied, so the result is withheld"
        )
    return readings


class EncoderUse(NamedTuple):
    """An encoder and who asks it: the places `rows` of edits in a bank, and their `columns`."""

    encoder: Encoder
    rows: Tensor | slice
    columns: Tensor


def told_of(x: Float[Tensor, "T d"], edits: int, uses: Sequence[EncoderUse]) -> Told | None:
    """What the encoders in `uses` say of `edits` edits; None where there are none."""
    if not uses:
        return None
    cutoff, given, values = x.new_full((len(x), edits), -math.inf), None, None
    for encoder, rows, columns in uses:
        found = encoder.tell(x, columns)
        if not encoder.gives_activations:
            cutoff[:, rows] = found
            continue
        if given is None or values is None:
            given = torch.zeros(edits, dtype=torch.bool, device=x.device)
            values = torch.zeros_like(cutoff)
        given[rows], values[:, rows] = True, found
    return Told(cutoff, given, values)


def gate_open(
    x: Float[Tensor, "T d"],
    direction: Float[Tensor, "T d"],
    cosine: Bool[Tensor, " T"],
    above: Float[Tensor, " T"],
    below: Float[Tensor, " T"],
    bias: Float[Tensor, " T"],
) -> tuple[Bool[Tensor, " T"], Float[Tensor, " T"]]:
    """Whether each token's gate opens, and the value it read.

    The value is the product with the row of `direction`, or where `cosine` the cosine with that
    row of length 1, and `bias`.
    """
    x = x.float()
    value = (x * direction).sum(-1)
    length = x.norm(dim=-1).clamp_min(TINY)
    value = torch.where(cosine, value / length, value) + bias
    return in_range(value, above, below), value


def in_range(
    value: Float[Tensor, " T"], above: Float[Tensor, " T"], below: Float[Tensor, " T"]
) -> Bool[Tensor, " T"]:
    """Whether a gate that has read each `value` is open; NaN opens none."""
    return (value > above) & (value < below)
