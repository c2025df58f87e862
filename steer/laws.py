"""The scalar laws of edits: what an edit reads of a row, and how much of its direction it writes.

One family with nine parameters (`Law`) has every kind's law c:

    a    = ⟨r, x⟩                  divided by ‖x‖ or σ(x) where `measure` says so
    u    = a + bias                where that exceeds `threshold`, else 0; or the share of ‖x‖ it is
    c(a) = clip(intercept + slope · u, floor, ceiling)         times a length where `relative`

and c = 0 where `only_active` and u is 0. The length is ‖x‖, σ(x), or that of
x in the plane that the block's other edits read; σ is the deviation of a row's channels from their
mean.

Shapes: T tokens, K edits, d the width of the hook point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Law(NamedTuple):
    """The scalar law of one edit; the defaults are c(a) = a."""

    bias: float = 0.0
    threshold: float = -math.inf
    intercept: float = 0.0
    slope: float = 1.0
    floor: float = -math.inf
    ceiling: float = math.inf
    relative: float = 0.0
    """`TO_NORM`, `TO_PLANE`, `TO_DEVIATION`, or 0."""
    measure: float = 0.0
    """`PRODUCT`, `COSINE`, `CENTRED` or `SHARE`."""
    only_active: float = 0.0

    @staticmethod
    def constant(value: float, *, relative: bool = False) -> Law:
        """c = value, or value · ‖x‖: the law of an addition."""
        return Law(intercept=value, slope=0.0, relative=TO_NORM if relative else 0.0)

    @staticmethod
    def toward(
        target: float, mode: str = "set", *, bias: float = 0.0, threshold: float = -math.inf
    ) -> Law:
        """c = target − u: moves the value read to `target`, or only up, or only down to it."""
        floor = 0.0 if mode == "at_least" else -math.inf
        ceiling = 0.0 if mode == "at_most" else math.inf
        return Law(bias, threshold, target, -1.0, floor, ceiling)

    @staticmethod
    def scaled(factor: float, *, bias: float = 0.0, threshold: float = -math.inf) -> Law:
        """c = (factor − 1) · u: multiplies the value read."""
        return Law(bias, threshold, 0.0, factor - 1.0)


LAW_FIELDS = len(Law._fields)
BIAS, THRESHOLD, INTERCEPT, SLOPE, FLOOR, CEILING, RELATIVE, MEASURE, ONLY_ACTIVE = range(
    LAW_FIELDS
)
TO_NORM, TO_PLANE, TO_DEVIATION = RELATIONS = 1.0, 2.0, 3.0
"""What a relative law is relative to: ‖x‖, the length of x in the plane that the block's edits of
other laws read, whose rows are orthonormal, or σ(x)."""
PRODUCT, COSINE, CENTRED, SHARE = MEASURES = 0.0, 1.0, 2.0, 3.0
"""What a law reads: ⟨r, x⟩; that over ‖x‖; that over σ(x) + 1e-5, for a row r without a mean; or
u/‖x‖, the share of the norm that is above the threshold."""
EPSILON = 1e-5
"""What keeps the division by σ(x) finite, as in the SAEs that are trained on centred tokens."""


class Traits(NamedTuple):
    """What any of several laws has; what none has need not be computed."""

    thresholded: bool = True
    clipped: bool = True
    relative: bool = True
    planar: bool = True
    spread: bool = True
    cosine: bool = True
    centred: bool = True
    shared: bool = True
    selective: bool = True

    @staticmethod
    def of(laws: Float[Tensor, "K 9"]) -> Traits:
        """The traits of `laws`, which lie on the host."""
        columns, relative, measure = laws.isfinite(), laws[:, RELATIVE], laws[:, MEASURE]
        return Traits(
            thresholded=bool(columns[:, THRESHOLD].any()),
            clipped=bool(columns[:, FLOOR : CEILING + 1].any()),
            relative=bool((relative == TO_NORM).any()),
            planar=bool((relative == TO_PLANE).any()),
            spread=bool((relative == TO_DEVIATION).any()),
            cosine=bool((measure == COSINE).any()),
            centred=bool((measure == CENTRED).any()),
            shared=bool((measure == SHARE).any()),
            selective=bool(laws[:, ONLY_ACTIVE].any()),
        )

    @property
    def measures_norm(self) -> bool:
        """Whether a law needs ‖x‖."""
        return self.relative or self.cosine or self.shared

    @property
    def measures_deviation(self) -> bool:
        """Whether a law needs σ(x)."""
        return self.spread or self.centred

    def either(self, other: Traits) -> Traits:
        return Traits(*(mine or theirs for mine, theirs in zip(self, other, strict=True)))


EVERY_TRAIT = Traits()
NO_TRAIT = Traits(*(False,) * len(EVERY_TRAIT))

TINY = torch.finfo(torch.float32).tiny
"""What keeps the division by ‖x‖ finite."""


@dataclass(frozen=True)
class LawColumns:
    """The laws of K edits by field, each `[K]`, and which of them measure, or are relative to,
    what: made once for many passes. `traits` are theirs, or more."""

    bias: Float[Tensor, " K"]
    threshold: Float[Tensor, " K"]
    intercept: Float[Tensor, " K"]
    slope: Float[Tensor, " K"]
    floor: Float[Tensor, " K"]
    ceiling: Float[Tensor, " K"]
    selective: Bool[Tensor, " K"]
    cosine: Bool[Tensor, " K"]
    centred: Bool[Tensor, " K"]
    shared: Bool[Tensor, " K"]
    to_norm: Bool[Tensor, " K"]
    to_plane: Bool[Tensor, " K"]
    to_deviation: Bool[Tensor, " K"]
    traits: Traits

    @staticmethod
    def of(laws: Float[Tensor, "K 9"], traits: Traits = EVERY_TRAIT) -> LawColumns:
        bias, threshold, intercept, slope, floor, ceiling, relative, measure, only_active = (
            laws.T.contiguous().unbind()
        )
        return LawColumns(
            bias=bias,
            threshold=threshold,
            intercept=intercept,
            slope=slope,
            floor=floor,
            ceiling=ceiling,
            selective=only_active > 0,
            cosine=measure == COSINE,
            centred=measure == CENTRED,
            shared=measure == SHARE,
            to_norm=relative == TO_NORM,
            to_plane=relative == TO_PLANE,
            to_deviation=relative == TO_DEVIATION,
            traits=traits,
        )

    def __len__(self) -> int:
        return len(self.bias)


class Lengths(NamedTuple):
    """What laws measure of each token, as far as their traits need it; `[T, 1]`, or `[1, K]` where
    each edit has a token of its own."""

    norm: Tensor | None = None
    deviation: Tensor | None = None
    plane: Tensor | None = None

    @staticmethod
    def of(x: Float[Tensor, "T d"], traits: Traits) -> Lengths:
        """The lengths of x but that in the plane, which depends on the block."""
        return Lengths(
            x.norm(dim=-1, keepdim=True) if traits.measures_norm else None,
            deviation(x) if traits.measures_deviation else None,
        )

    def read_at(self, there: Lengths, laws: LawColumns) -> Lengths:
        """These of the state that is written to, with those of the state `there` for laws that
        measure it in its own length: what they write is in that length too."""
        if not (laws.traits.cosine or laws.traits.centred):
            return self
        own = ~(laws.cosine | laws.centred)
        pairs = zip(self, there, strict=True)
        return Lengths(*(h if h is None or t is None else torch.where(own, h, t) for h, t in pairs))


def deviation(x: Float[Tensor, "T d"]) -> Float[Tensor, "T 1"]:
    """σ(x): the unbiased standard deviation of each row's channels."""
    length: Tensor = (x - x.mean(dim=-1, keepdim=True)).norm(dim=-1, keepdim=True)
    free: float = max(x.shape[-1] - 1, 1)
    return length / math.sqrt(free)


class Told(NamedTuple):
    """What encoders say of K edits: the least absolute pre-activation that counts as active, −∞
    where there is none; and for the edits `given`, `[K]`, the `activations` themselves."""

    cutoff: Tensor
    given: Tensor | None = None
    activations: Tensor | None = None

    def of_one_token(self, tokens: Int[Tensor, " K"]) -> Told:
        """The same of one token for each edit, `[1, K]`."""
        cutoff = self.cutoff.gather(0, tokens[None])
        if self.activations is None:
            return Told(cutoff)
        return Told(cutoff, self.given, self.activations.gather(0, tokens[None]))


def activations(
    products: Float[Tensor, "T K"],
    laws: LawColumns,
    lengths: Lengths,
    told: Told | None = None,
) -> Float[Tensor, "T K"]:
    """u for `products` ⟨r_k, x⟩, before any share of the norm is taken.

    `lengths` are what the laws need of x (`Lengths.of`).
    """
    value = _measured(products, laws, lengths) + laws.bias
    if laws.traits.thresholded or laws.traits.selective or told is not None:
        inactive = value <= laws.threshold
        if told is not None:
            inactive |= value.abs() < told.cutoff
        value = value.masked_fill(inactive, 0.0)
    if told is not None and told.given is not None and told.activations is not None:
        value = torch.where(told.given, told.activations, value)
    return value


def coefficients(
    values: Float[Tensor, "T K"], laws: LawColumns, lengths: Lengths
) -> Float[Tensor, "T K"]:
    """c_k(u) for `values` u_k, each column by its own law.

    `lengths` are as for `activations`, with that in the plane (`squares_in_plane`).
    """
    value, traits = values, laws.traits
    if traits.shared and lengths.norm is not None:
        value = torch.where(laws.shared, value / lengths.norm.clamp_min(TINY), value)
    c = torch.addcmul(laws.intercept, laws.slope, value)
    if traits.clipped:
        c = c.clamp(laws.floor, laws.ceiling)
    if traits.selective:
        c = c.masked_fill((values == 0) & laws.selective, 0.0)
    for relative, length in (
        (laws.to_norm, lengths.norm),
        (laws.to_plane, lengths.plane),
        (laws.to_deviation, lengths.deviation),
    ):
        if length is not None:
            c = torch.where(relative, c * length, c)
    return c


def _measured(
    products: Float[Tensor, "T K"], laws: LawColumns, lengths: Lengths
) -> Float[Tensor, "T K"]:
    """What is read of each token, before any bias."""
    value = products
    if laws.traits.cosine and lengths.norm is not None:
        value = torch.where(laws.cosine, value / lengths.norm.clamp_min(TINY), value)
    if laws.traits.centred and lengths.deviation is not None:
        value = torch.where(laws.centred, value / (lengths.deviation + EPSILON), value)
    return value


def squares_in_plane(products: Float[Tensor, "T K"], laws: LawColumns) -> Float[Tensor, "T K"]:
    """What each edit adds to the squared length of x in its block's plane."""
    return products.square().masked_fill(laws.to_plane, 0.0)
