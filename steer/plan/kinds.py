"""Interventions to blocks: what each kind means as arithmetic at its hook points.

One function per kind, called like it, from the intervention and what was resolved for it to
`{hook point: Block}`; an intervention that would change nothing (strength 0, rotation by 0°)
compiles to no block, so that zero is bit-identical. Errors carry a pointer relative to the
intervention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.edits import Block, Law, TopKCutoff
from steer.errors import SpecError, SteerError, Unsupported
from steer.model import HookPoint
from steer.plan.points import row
from steer.plan.resolve import Resolved
from steer.spec import (
    Ablate,
    Add,
    Clamp,
    Concept,
    LowRank,
    NormStrength,
    Patch,
    Project,
    Rotate,
    Swap,
)

Blocks = dict[HookPoint, Block]


def blocks_of(one: Resolved) -> Blocks:
    """What `one` does at each of its hook points."""
    return _KINDS[one.item.kind](one.item, one)


def add(item: Add, one: Resolved) -> Blocks:
    vector, strength = one.direction, item.strength
    if isinstance(strength, float | int):
        if strength == 0:
            return {}
        return {p: Block(shift=strength * row(vector, p.layer)) for p in one.points}
    if not isinstance(strength, NormStrength):
        raise AssertionError(f"the strength {strength!r} was not resolved before compiling")
    if strength.norm == 0:
        return {}
    law = Law.constant(strength.norm, relative=True)
    return {p: _addition(_unit(row(vector, p.layer)), law) for p in one.points}


def ablate(item: Ablate, one: Resolved) -> Blocks:
    vector = one.direction
    if item.strength == 0:
        return {}
    law = Law(slope=-item.strength)
    return {p: _along(_unit(row(vector, p.layer)), law) for p in one.points}


def project(item: Project, one: Resolved) -> Blocks:
    vector = one.vector("vector")
    return {
        p: _along(
            _unit(row(vector, p.layer)), Law.toward(_projection(item, vector, p.layer), item.mode)
        )
        for p in one.points
    }


def _projection(item: Project, vector: ControlVector, layer: int) -> float:
    """The target projection: a number, or the class mean or cap on the vector's card."""
    if isinstance(item.value, float | int):
        return item.value
    measure = vector.card.measures.get(layer)
    mean = None if measure is None else getattr(measure, item.value)
    if mean is None:
        raise SpecError(
            f"the card of {vector.card.name!r} records no {item.value!r} projection for layer "
            f"{layer}: give 'value' as a number, or fit the vector with `steer fit`",
            param="/value",
            code="not_measured",
        )
    return float(mean)


def clamp(item: Clamp, one: Resolved) -> Blocks:
    """f ← value on the chosen features, the rest of x untouched (Scaling Monosemanticity)."""
    sae, (point,) = one.sae("sae"), one.points
    try:
        reads = sae.reads(item.features)
    except SteerError as error:
        raise error.at("/features") from None
    values = item.value if isinstance(item.value, tuple) else (item.value,) * len(item.features)
    if item.mode == "scale" and all(value == 1 for value in values):
        return {}
    laws = []
    for value, bias, threshold in zip(
        values, reads.bias.tolist(), reads.threshold.tolist(), strict=True
    ):
        if item.mode == "scale":
            laws.append(Law.scaled(value, bias=bias, threshold=threshold))
        else:
            laws.append(Law.toward(value, item.mode, bias=bias, threshold=threshold))
    cutoff = None
    if sae.k is not None:
        every = sae.reads(None)
        cutoff = TopKCutoff(sae.sha256, every.read, every.bias, sae.k)
    block = Block.of_edits(reads.read, sae.writes(item.features), laws, cutoff=cutoff)
    return {point: block}


def concept(item: Concept, one: Resolved) -> Blocks:
    """λ·Σ zᵢ·W_dec[i], z the mean latents of the text without the top-k limit (2501.19066)."""
    sae, (point,) = one.sae("sae"), one.points
    if one.encode_text is None:
        raise Unsupported("a concept needs a model to read its text: none is attached here")
    latents = sae.latents(one.encode_text(item.text, point)).mean(0)
    if item.contrast is not None:
        latents = latents - sae.latents(one.encode_text(item.contrast, point)).mean(0)
    active = latents.nonzero()[:, 0]
    if item.strength == 0 or len(active) == 0:
        return {}
    return {point: Block(shift=item.strength * (latents[active] @ sae.writes(active.tolist())))}


def swap(item: Swap, one: Resolved) -> Blocks:
    """x + β‖x‖(v̂_add − v̂_remove) (LRC, 2311.08968)."""
    old, new = one.vector("remove"), one.vector("add")
    if item.strength == 0:
        return {}
    law = Law.constant(item.strength, relative=True)
    return {
        p: _addition(_unit(row(new, p.layer)) - _unit(row(old, p.layer)), law) for p in one.points
    }


def low_rank(item: LowRank, one: Resolved) -> Blocks:
    """x + α·Rᵀ(Wx + b − Rx) (LoReFT, 2404.03592)."""
    adapter = one.adapter("adapter")
    strength = adapter.card.default_strength if item.strength is None else item.strength
    if strength == 0:
        return {}
    blocks: Blocks = {}
    for point in one.points:
        rotation, weight, bias = adapter.parts[point.layer]
        laws = [Law(bias=value, slope=strength) for value in bias.tolist()]
        blocks[point] = Block.of_edits(weight - rotation, rotation, laws)
    return blocks


def rotate(item: Rotate, one: Resolved) -> Blocks:
    """Rotation by θ in span(a, b): two rank-1 edits on an orthonormal basis of the plane."""
    vector, toward = one.vector("vector"), one.vector("toward")
    angle = math.radians(item.degrees)
    if item.degrees == 0:
        return {}
    blocks: Blocks = {}
    for point in one.points:
        a = _unit(row(vector, point.layer).double())
        b = row(toward, point.layer).double()
        rest = b - (a @ b) * a
        if rest.norm() <= 1e-6 * b.norm():
            raise SpecError(
                "'vector' and 'toward' are parallel and span no plane: choose another direction",
                param="/toward",
                code="no_plane",
            )
        second = _unit(rest)
        cos, sin = math.cos(angle) - 1.0, math.sin(angle)
        read = torch.stack([cos * a - sin * second, sin * a + cos * second]).float()
        blocks[point] = Block.of_edits(read, torch.stack([a, second]).float(), [Law(), Law()])
    return blocks


def patch(_: Patch, one: Resolved) -> Blocks:
    """x ← state (Patchscopes, 2401.06102)."""
    vector = one.vector("vector")
    return {p: Block(shift=row(vector, p.layer), replace=True) for p in one.points}


def _unit(direction: Tensor) -> Tensor:
    length: Tensor = direction.norm()
    return direction / length


def _along(unit: Tensor, law: Law) -> Block:
    return Block.of_edits(unit[None], unit[None], [law])


def _addition(write: Tensor, law: Law) -> Block:
    return Block.of_edits(torch.zeros_like(write)[None], write[None], [law])


_KINDS: Mapping[str, Callable[[Any, Resolved], Blocks]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (add, ablate, project, clamp, concept, swap, low_rank, rotate, patch)
    }
)
