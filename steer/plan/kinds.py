"""Interventions to blocks: what each kind means as arithmetic at its hook points.

One function per kind, called like it, from the intervention and what was resolved for it to
`{hook point: Block}`; an intervention that would change nothing (strength 0, rotation by 0°)
compiles to no block, so that zero is bit-identical. Errors carry a pointer relative to the
intervention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.affine import channel_rows
from steer.artefacts.control_vector import ControlVector
from steer.edits import Block
from steer.errors import SpecError
from steer.laws import COSINE, PRODUCT, TO_NORM, TO_PLANE, Law
from steer.plan.clamps import clamp, with_absorbers
from steer.plan.concepts import concept, read_concept
from steer.plan.plan import Blocks
from steer.plan.points import row
from steer.plan.resolve import Resolved
from steer.spec import NormStrength
from steer.spec.interventions import (
    Ablate,
    Add,
    Affine,
    Exchange,
    LowRank,
    Patch,
    Project,
    ReadWrite,
    Rotate,
    Swap,
)

_PREPARED: Mapping[str, Callable[[Any, Resolved], Resolved]] = MappingProxyType(
    {"clamp": with_absorbers, "concept": read_concept}
)
"""What a kind works out of its artefacts or its text before strengths and blocks are known."""


def prepared(one: Resolved) -> Resolved:
    """An intervention with what its kind works out first. Raises `SteerError`."""
    prepare = _PREPARED.get(one.item.kind)
    return one if prepare is None else prepare(one.item, one)


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


def swap(item: Swap, one: Resolved) -> Blocks:
    """x + β‖x‖(v̂_add − v̂_remove) (LRC, 2311.08968)."""
    old, new = one.vector("remove"), one.vector("add")
    if item.strength == 0:
        return {}
    law = Law.constant(item.strength, relative=True)
    return {
        p: _addition(_unit(row(new, p.layer)) - _unit(row(old, p.layer)), law) for p in one.points
    }


def exchange(item: Exchange, one: Resolved) -> Blocks:
    """x + α·⟨r, x⟩(t̂ − v̂), r being v̂, or the difference of the coordinates along v̂ and t̂.

    Either way it has rank 1: the rows of the pseudoinverse of [v̂ t̂] read the coordinates, and
    their difference is what both change by.
    """
    vector, toward = one.vector("vector"), one.vector("toward")
    if item.strength == 0:
        return {}
    _check_exchanged_once(item, one)
    threshold = 0.0 if item.mode == "one_way" else -math.inf
    law = Law(threshold=threshold, slope=item.strength)
    blocks: Blocks = {}
    for point in one.points:
        first, second = _plane(row(vector, point.layer), row(toward, point.layer))
        b = _unit(row(toward, point.layer).double())
        read = first
        if item.mode != "move":
            # x = c_v v̂ + c_t t̂ in the plane: c_t is what stands across v̂, c_v the rest along it.
            to_toward = second / (second @ b)
            read = first - (first @ b) * to_toward - to_toward
        blocks[point] = _edit(read.float(), (b - first).float(), law)
    return blocks


def _check_exchanged_once(item: Exchange, one: Resolved) -> None:
    """Raises `SpecError` where each layer would take back what the one before it did.

    Along t̂ − v̂ mode `both` multiplies by 1 − 2α. What it did stands in the stream at the next
    layer, so that with α = 1 two layers leave it as it was; up to α = ½ the sign stays.
    """
    if item.mode == "both" and item.strength > 0.5 and len(one.points) > 1:
        layers = [point.layer for point in one.points]
        raise SpecError(
            f"mode 'both' would exchange at each of the layers {layers}, and each takes back what "
            "the one before it did: name one layer, or use the mode 'one_way' or 'move', or a "
            "strength of 0.5 or less, which makes the two alike",
            code="undoes_itself",
            param="/layers",
        )


def read_write(item: ReadWrite, one: Resolved) -> Blocks:
    """x + α·f(⟨r, x⟩ + b)·w (PSR, 2605.03907)."""
    read, write = one.vector("read"), one.vector("write")
    relative = isinstance(item.strength, NormStrength)
    strength = item.strength.norm if isinstance(item.strength, NormStrength) else item.strength
    if strength == 0:
        return {}
    law = Law(
        bias=item.bias,
        threshold=item.threshold if item.activation == "relu" else -math.inf,
        slope=strength,
        relative=TO_NORM if relative else 0.0,
        measure=COSINE if item.measure == "cosine" else PRODUCT,
    )
    blocks: Blocks = {}
    for point in one.points:
        reads, writes = row(read, point.layer), row(write, point.layer)
        reads = reads if item.measure == "product" else _unit(reads)
        blocks[point] = _edit(reads, _unit(writes) if relative else writes, law)
    return blocks


def low_rank(item: LowRank, one: Resolved) -> Blocks:
    """x + α·Σ f(⟨r, x⟩ + b)·w; LoReFT (2404.03592) reads W − R and writes R."""
    adapter = one.adapter("adapter")
    strength = adapter.card.default_strength if item.strength is None else item.strength
    if strength == 0:
        return {}
    blocks: Blocks = {}
    for point in one.points:
        read, write, bias, threshold = adapter.edits(point.layer)
        limits = [-math.inf] * len(bias) if threshold is None else threshold.tolist()
        laws = [
            Law(bias=value, threshold=limit, slope=strength)
            for value, limit in zip(bias.tolist(), limits, strict=True)
        ]
        blocks[point] = Block.of_edits(read, write, laws)
    return blocks


def affine(item: Affine, one: Resolved) -> Blocks:
    """x + λ((ω ⊙ x + β) − x) on the channels inside their bounds (Linear-AcT, 2410.23054)."""
    found = one.affine_map("map")
    strength = found.card.default_strength if item.strength is None else item.strength
    if strength == 0:
        return {}
    return {p: Block(channels=channel_rows(found.channels[p.layer], strength)) for p in one.points}


def rotate(item: Rotate, one: Resolved) -> Blocks:
    """Rotation in span(a, b), on an orthonormal basis of the plane.

    By θ it is two rank-1 edits. To θ (2510.26243) the part in the plane is taken away and written
    again at that angle: x − Px + ‖Px‖(cos θ·a + sin θ·b), two edits that read the plane and one
    that is relative to what they read.
    """
    vector, toward = one.vector("vector"), one.vector("toward")
    if item.degrees == 0 and item.mode == "by":
        return {}
    angle = math.radians(item.degrees)
    blocks: Blocks = {}
    for point in one.points:
        a, b = _plane(row(vector, point.layer), row(toward, point.layer))
        if item.mode == "by":
            cos, sin = math.cos(angle) - 1.0, math.sin(angle)
            read = torch.stack([cos * a - sin * b, sin * a + cos * b])
            write, laws = torch.stack([a, b]), [Law(), Law()]
        else:
            aim = math.cos(angle) * a + math.sin(angle) * b
            read = torch.stack([a, b, torch.zeros_like(a)])
            write = torch.stack([a, b, aim])
            length = Law(intercept=1.0, slope=0.0, relative=TO_PLANE)
            laws = [Law(slope=-1.0), Law(slope=-1.0), length]
        block = Block.of_edits(read.float(), write.float(), laws)
        blocks[point] = block if item.only is None else replace(block, side=a.float())
    return blocks


def _plane(vector: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis, float64, of the plane of both, beginning with the first direction."""
    a, b = _unit(vector.double()), toward.double()
    rest = b - (a @ b) * a
    if rest.norm() <= 1e-6 * b.norm():
        raise SpecError(
            "'vector' and 'toward' are parallel and span no plane: choose another direction",
            param="/toward",
            code="no_plane",
        )
    return a, _unit(rest)


def patch(_: Patch, one: Resolved) -> Blocks:
    """x ← state (Patchscopes, 2401.06102)."""
    vector = one.vector("vector")
    return {p: Block(shift=row(vector, p.layer), replace=True) for p in one.points}


def _unit(direction: Tensor) -> Tensor:
    length: Tensor = direction.norm()
    return direction / length


def _edit(read: Tensor, write: Tensor, law: Law) -> Block:
    return Block.of_edits(read[None], write[None], [law])


def _along(unit: Tensor, law: Law) -> Block:
    return _edit(unit, unit, law)


def _addition(write: Tensor, law: Law) -> Block:
    return _edit(torch.zeros_like(write), write, law)


_KINDS: Mapping[str, Callable[[Any, Resolved], Blocks]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            add,
            ablate,
            project,
            clamp,
            concept,
            swap,
            exchange,
            read_write,
            low_rank,
            affine,
            rotate,
            patch,
        )
    }
)
