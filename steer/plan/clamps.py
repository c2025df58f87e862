"""Clamps of SAE features to blocks: x + Σ (c − f)·W_dec, with f the feature and c what it becomes.

A feature whose activation depends on its own row alone costs one read and one write; where features
compete, an encoder is asked about the token's others too (`steer.artefacts.sae.competing`). An SAE
that normalises each token reads and writes in units of that token's length, which its laws do as
well: the change is exact. A transcoder's features are read where it reads and written where it
writes: what it adds whatever they are (b_dec, W_skip) cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.competing import MEASURES, check_k, competing
from steer.artefacts.sae.reads import FeatureReads
from steer.edits import Block
from steer.errors import SpecError, SteerError, TooLarge, Unsupported
from steer.laws import COSINE, SHARE, TO_DEVIATION, TO_NORM, Law
from steer.model import HookPoint
from steer.plan.plan import Blocks
from steer.plan.resolve import Resolved
from steer.spec import MAX_FEATURES, Clamp, NormValue

_RELATIONS = {"product": 0.0, "cosine": TO_NORM, "centred": TO_DEVIATION}
_MOST_NUMBERS = 2**26
"""The most numbers of an SAE that a plan carries: 256 MiB."""


def clamp(item: Clamp, one: Resolved) -> Blocks:
    """f ← c on the chosen features, the rest of x untouched (Scaling Monosemanticity)."""
    sae, (point,) = one.sae("sae"), one.points
    if item.k is not None:
        _check_k(sae, item.k)
    if item.mode == "keep_only":
        item = _drop_of_others(item, sae)
    try:
        reads = sae.reads(item.features)
    except SteerError as error:
        raise error.at("/features") from None
    writes = _writes(item, sae, reads)
    identity = {"scale": 1.0, "add": 0.0}.get(item.mode)
    if all(value == identity for value in item.numbers):
        return {}
    if item.mode == "add" and item.balance is None and not item.only_if_active:
        return {point: _addition(item, sae, writes)}
    _check_length(item, sae)
    asked = competing(sae, item.features, item.k)
    block = Block.of_edits(
        reads.read,
        writes,
        _laws(item, sae, reads, writes),
        encoder=None if asked is None else asked.encoder,
        columns=None if asked is None else asked.columns,
        reads_at=_reads_at(sae),
    )
    return {point: block}


def _reads_at(sae: SAE) -> HookPoint | None:
    """Where a transcoder reads; None for an SAE that reads where it writes.

    Raises `Unsupported` (`two_sites`) for one that could only be served backwards, or by rows of
    two widths.
    """
    if not sae.is_transcoder:
        return None
    if not sae.writes_later:
        raise Unsupported(
            f"the transcoder {sae.card.name!r} reads rows of width {sae.d_in} at {sae.site} and "
            f"writes rows of width {sae.d_out} at {sae.write_point.site}; what is read must come "
            "before what is written, in rows as long: capture its features, or use mode 'add'",
            param="/sae",
            code="two_sites",
        )
    return HookPoint(sae.layer, sae.site)


def _check_k(sae: SAE, k: int) -> None:
    try:
        check_k(sae, k)
    except SteerError as error:
        raise error.at("/k") from None


def _check_length(item: Clamp, sae: SAE) -> None:
    """Raises `Unsupported` (`norm_of_two_sites`) for a clamp that has two lengths."""
    if isinstance(item.value, NormValue) and sae.is_transcoder and sae.measure != "product":
        raise Unsupported(
            f"the transcoder {sae.card.name!r} measures activations in the length of what it "
            "reads, and 'value' is a share of the norm where it writes: give 'value' as an "
            "activation, or use mode 'add' without 'balance' and 'only_if_active'",
            param="/value",
            code="norm_of_two_sites",
        )


def _drop_of_others(item: Clamp, sae: SAE) -> Clamp:
    """`keep_only` as what it does: one read and one write of every other feature, which is one
    encode and one decode for each token."""
    numbers = 2 * sae.d_sae * sae.d_in
    if numbers > _MOST_NUMBERS:
        raise TooLarge(
            "mode 'keep_only' needs all rows of the SAE in the plan: those of "
            f"{sae.d_sae} features of width {sae.d_in} are {numbers} numbers, and a plan holds "
            f"{_MOST_NUMBERS}. Name the features that shall go, with mode 'drop'",
            param="/mode",
            code="keep_only_too_large",
        )
    others = tuple(n for n in range(sae.d_sae) if n not in set(item.features))
    return item.model_copy(update={"features": others, "mode": "drop"})


def _writes(item: Clamp, sae: SAE, reads: FeatureReads) -> Tensor:
    """What an activation of 1 adds; of length 1 where shares of the norm are added."""
    writes = sae.writes(item.features)
    if not isinstance(item.value, NormValue):
        return writes * reads.write_scale
    lengths = writes.norm(dim=-1, keepdim=True)
    for feature, length in zip(item.features, lengths[:, 0].tolist(), strict=True):
        if length == 0:
            raise SpecError(
                f"the decoder row of feature {feature} is zero, and no value makes it a share of a "
                "token's norm: leave the feature out",
                param="/features",
                code="no_direction",
            )
    return writes / lengths if item.mode == "add" else writes * reads.write_scale


def _addition(item: Clamp, sae: SAE, writes: Tensor) -> Block:
    """What is added whatever the features are: a constant, or one in the token's length."""
    row = torch.tensor(item.numbers, dtype=torch.float32) @ writes
    if isinstance(item.value, NormValue):
        return _relative(row, Law.constant(1.0, relative=True))
    return _in_units(row, sae)


def added(row: Tensor, sae: SAE) -> Block:
    """A sum of decoder rows as an addition, in the units in which the SAE writes."""
    return _in_units(row * sae.write_scale, sae)


def _in_units(row: Tensor, sae: SAE) -> Block:
    """`row` as an addition: a constant, or one in the length of the token that the SAE reads."""
    if sae.measure == "product":
        return Block(shift=row)
    reads_at = _reads_at(sae)
    law = Law.constant(1.0)._replace(relative=_RELATIONS[sae.measure])
    if reads_at is not None:
        law = law._replace(measure=MEASURES[sae.measure])
    return _relative(row, law, reads_at)


def _relative(row: Tensor, law: Law, reads_at: HookPoint | None = None) -> Block:
    return Block.of_edits(torch.zeros_like(row)[None], row[None], [law], reads_at=reads_at)


def _laws(item: Clamp, sae: SAE, reads: FeatureReads, writes: Tensor) -> list[Law]:
    """The law of each feature, in the units in which the SAE reads and writes (`_writes`)."""
    numbers, signed = item.numbers, sae.signed
    measure, relative = MEASURES[reads.measure], _RELATIONS[reads.measure]
    if isinstance(item.value, NormValue):
        if item.mode != "add":
            measure = _share_of_norm(reads)
            lengths = writes.norm(dim=-1).tolist()
            numbers = tuple(value / length for value, length in zip(numbers, lengths, strict=True))
        relative = TO_NORM
    active = float(item.only_if_active)
    return [
        _law(item, value, signed=signed)._replace(
            bias=bias,
            threshold=threshold,
            measure=measure,
            relative=relative,
            only_active=active,
        )
        for value, bias, threshold in zip(
            numbers, reads.bias.tolist(), reads.threshold.tolist(), strict=True
        )
    ]


def _law(item: Clamp, value: float, *, signed: bool) -> Law:
    """c − f for one feature, as a function of f, which may be negative where it is `signed`."""
    if item.mode in ("scale", "drop"):
        return Law.scaled(value)
    if item.mode != "add":
        return Law.toward(value, item.mode)
    if item.balance is None:
        return Law.constant(value)
    # A negative f is no part of what counts as full.
    most = max(value, 0.0) if signed else math.inf
    if value > 0:
        return Law(intercept=value, slope=-value / item.balance, floor=0.0, ceiling=most)
    return Law(slope=value / item.balance, floor=value, ceiling=most)


def _share_of_norm(reads: FeatureReads) -> float:
    """The measure by which a feature is read, if its target is a share of the token's norm."""
    if reads.measure == "centred":
        raise Unsupported(
            "this SAE measures a token's activations in its deviation and not in its norm: give "
            "'value' as an activation, or use mode 'add'",
            param="/value",
            code="norm_of_centred",
        )
    return COSINE if reads.measure == "cosine" else SHARE


def with_absorbers(item: Clamp, one: Resolved) -> Resolved:
    """A clamp with the features that may be active in the place of those it names, where it asks
    for them, each with the value of the one it is nearest to (absorption, 2409.14507)."""
    if item.with_absorbers is None:
        return one
    numbers, sae = item.numbers, one.sae("sae")
    try:
        found = dict(_absorbers(sae, item.features, item.with_absorbers))
    except SteerError as error:
        raise error.at("/features") from None
    features = (*item.features, *found)
    if len(features) > MAX_FEATURES:
        raise SpecError(
            f"{len(found)} features have a cosine of at least {item.with_absorbers!r} with the "
            f"{len(item.features)} named, and a clamp takes at most {MAX_FEATURES}: ask for a "
            "larger cosine",
            param="/with_absorbers",
            code="too_many_absorbers",
        )
    each = (*numbers, *(numbers[nearest] for nearest in found.values()))
    value = NormValue(norm=each) if isinstance(item.value, NormValue) else each
    update = {"features": features, "value": None if item.value is None else value}
    return replace(one, item=item.model_copy(update=update))


def _absorbers(sae: SAE, features: tuple[int, ...], least: float) -> Iterable[tuple[int, int]]:
    """The features, other than those named, whose decoder rows have a cosine of `least` with one of
    theirs, and the place of the nearest; the whole decoder is read, some rows at a time."""
    for start, cosines in sae.decoder.cosines(sae.writes(features)):
        cosine, nearest = cosines.max(dim=1)
        for row in (cosine >= least).nonzero()[:, 0].tolist():
            if start + row not in features:
                yield start + row, int(nearest[row])
