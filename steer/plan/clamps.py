"""Clamps of SAE features to blocks: x + Σ (c − f)·W_dec, with f the feature and c what it becomes.

A feature whose activation depends on its own row alone costs one read and one write; those of a
TopK SAE need the token's other features too (`TopKCutoff`). An SAE that normalises each token reads
and writes in units of that token's length, which its laws do as well: the change is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.reads import FeatureReads
from steer.edits import (
    CENTRED,
    COSINE,
    PRODUCT,
    SHARE,
    TO_DEVIATION,
    TO_NORM,
    Block,
    Law,
    TopKCutoff,
)
from steer.errors import SpecError, SteerError, TooLarge, Unsupported
from steer.plan.plan import Blocks
from steer.plan.resolve import Resolved
from steer.spec import MAX_FEATURES, Clamp, NormValue

_MEASURES = {"product": PRODUCT, "cosine": COSINE, "centred": CENTRED}
_RELATIONS = {"product": 0.0, "cosine": TO_NORM, "centred": TO_DEVIATION}
_MOST_NUMBERS = 2**26
"""The most numbers of an SAE that a plan carries: 256 MiB."""


def clamp(item: Clamp, one: Resolved) -> Blocks:
    """f ← c on the chosen features, the rest of x untouched (Scaling Monosemanticity)."""
    sae, (point,) = one.sae("sae"), one.points
    check_one_site(sae)
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
        return {point: _addition(item, reads, writes)}
    laws = _laws(item, reads, writes)
    return {point: Block.of_edits(reads.read, writes, laws, cutoff=_cutoff(sae))}


def check_one_site(sae: SAE) -> None:
    """Raises `Unsupported` (`two_sites`) for a transcoder: a block reads where it writes."""
    if sae.is_transcoder:
        raise Unsupported(
            f"the SAE {sae.card.name!r} is a transcoder, which reads at {sae.site} and writes at "
            f"{sae.write_point.site}; edits of two sites are not served: capture its features, or "
            "steer with an SAE of one site",
            param="/sae",
            code="two_sites",
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


def _addition(item: Clamp, reads: FeatureReads, writes: Tensor) -> Block:
    """What is added whatever the features are: a constant, or one in the token's length."""
    row = torch.tensor(item.numbers, dtype=torch.float32) @ writes
    relative = TO_NORM if isinstance(item.value, NormValue) else _RELATIONS[reads.measure]
    return _constant(row, relative)


def added(row: Tensor, sae: SAE) -> Block:
    """A sum of decoder rows as an addition, in the units in which the SAE writes."""
    return _constant(row * sae.write_scale, _RELATIONS[sae.measure])


def _constant(row: Tensor, relative: float) -> Block:
    if relative == 0:
        return Block(shift=row)
    law = Law.constant(1.0)._replace(relative=relative)
    return Block.of_edits(torch.zeros_like(row)[None], row[None], [law])


def _laws(item: Clamp, reads: FeatureReads, writes: Tensor) -> list[Law]:
    """The law of each feature, in the units in which the SAE reads and writes (`_writes`)."""
    numbers = item.numbers
    measure, relative = _MEASURES[reads.measure], _RELATIONS[reads.measure]
    if isinstance(item.value, NormValue):
        if item.mode != "add":
            measure = _share_of_norm(reads)
            lengths = writes.norm(dim=-1).tolist()
            numbers = tuple(value / length for value, length in zip(numbers, lengths, strict=True))
        relative = TO_NORM
    active = float(item.only_if_active)
    return [
        _law(item, value)._replace(
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


def _law(item: Clamp, value: float) -> Law:
    """c − f for one feature, as a function of f."""
    if item.mode in ("scale", "drop"):
        return Law.scaled(value)
    if item.mode != "add":
        return Law.toward(value, item.mode)
    if item.balance is None:
        return Law.constant(value)
    if value > 0:
        return Law(intercept=value, slope=-value / item.balance, floor=0.0)
    return Law(slope=value / item.balance, floor=value)


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


def _cutoff(sae: SAE) -> TopKCutoff | None:
    """The cutoff of a TopK SAE; None where a feature is read from its own row."""
    if not sae.competitive:
        return None
    if sae.architecture != "topk" or sae.k is None:
        raise Unsupported(
            f"features of a {sae.architecture} SAE cannot be clamped: which are active depends on "
            "all of them, in a way that no cutoff says. Add to them with mode 'add', or capture "
            "them",
            param="/sae",
            code="competitive_sae",
        )
    every = sae.reads(None)
    return TopKCutoff(sae.sha256, every.read, every.bias, sae.k, _MEASURES[every.measure])


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
