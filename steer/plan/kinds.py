"""Interventions to blocks: what each kind means as arithmetic at its hook points.

One function per kind, each returning `{hook point: Block}`; an intervention that would change
nothing (strength 0, rotation by 0°) compiles to no block, so that zero is bit-identical.
Errors carry a pointer relative to the intervention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library
from steer.artefacts.sae.base import SAE
from steer.edits import Block, Law, TopKCutoff
from steer.errors import IncompatibleArtefact, SpecError, SteerError, Unsupported
from steer.formats.inline import decode_inline
from steer.model import HookPoint, ModelInfo
from steer.spec import (
    Ablate,
    Add,
    Clamp,
    Concept,
    InlineVector,
    LowRank,
    NormStrength,
    Patch,
    Project,
    Rotate,
    Site,
    Swap,
    VectorRef,
)

Result = TypeVar("Result")
Blocks = dict[HookPoint, Block]
StrengthLimit: TypeAlias = Literal["off", "refuse", "cap"]
"""What happens to a strength outside the calibrated range of its vector."""
EncodeText = Callable[[str, HookPoint], Tensor]
"""A text and a hook point to its tokens' states `[tokens, width]`, by the model being served."""


@dataclass(frozen=True)
class Sources:
    """What compiling draws on: artefacts, the model's shape, and the model itself for texts."""

    library: Library
    model: ModelInfo
    encode_text: EncodeText | None = None
    overlay: Mapping[str, ControlVector] | None = None
    strength_limit: StrengthLimit = "off"
    composed: Mapping[tuple[str, Site], ControlVector] | None = None
    """The form in which a vector, by its hash, is added at a site, where it is not its own."""

    def vector(self, ref: VectorRef, field: str) -> ControlVector:
        """The vector that `ref` names; errors point at `field`."""
        if isinstance(ref, InlineVector):
            return _pointed(lambda: decode_inline(ref), f"/{field}")
        if self.overlay is not None and ref in self.overlay:
            return self.overlay[ref]
        return _pointed(lambda: self.library.vector(ref), f"/{field}")

    def sae(self, ref: str) -> SAE:
        return _pointed(lambda: self.library.sae(ref), "/sae")


def vector_points(
    item: Add | Ablate | Project | Swap | Rotate | Patch,
    vectors: Iterable[tuple[str, ControlVector]],
    model: ModelInfo,
) -> list[HookPoint]:
    """The hook points of an intervention on vectors, all checked against the model.

    A vector of one row may be used on any layer; a vector of several only on its own.
    """
    named = list(vectors)
    first = named[0][1].card
    site = item.site or first.site
    if item.layers == "all":
        layers = tuple(range(model.n_layers)) if len(first.layers) == 1 else first.layers
    else:
        layers = item.layers or first.used_layers
    points = [HookPoint(layer, site) for layer in layers]
    for point in points:
        model.check_point(point, param="/layers" if item.layers else f"/{named[0][0]}")
    for field, vector in named:
        if vector.card.width != model.width(site):
            raise IncompatibleArtefact(
                f"the vector {vector.card.name!r} has width {vector.card.width}; "
                f"{site} of {model.name!r} has width {model.width(site)}: "
                "use a vector made for this model and site",
                code="wrong_width",
                param=f"/{field}",
            )
        for layer in layers:
            _pointed(lambda layer=layer, vector=vector: row(vector, layer), "/layers")  # type: ignore[misc]
    return points


def row(vector: ControlVector, layer: int) -> Tensor:
    """The direction for `layer`; the only row of a one-row vector serves every layer."""
    if len(vector.directions) == 1:
        return next(iter(vector.directions.values()))
    return vector[layer]


def add(item: Add, sources: Sources) -> Blocks:
    vector = sources.vector(item.vector, "vector")
    points = vector_points(item, [("vector", vector)], sources.model)
    if sources.composed:
        vector = sources.composed.get((vector.sha256, points[0].site), vector)
    strength = vector.card.default_strength if item.strength is None else item.strength
    if isinstance(strength, float | int):
        if strength == 0:
            return {}
        return {p: Block(shift=strength * row(vector, p.layer)) for p in points}
    if not isinstance(strength, NormStrength):
        raise AssertionError(f"the strength {strength!r} was not resolved before compiling")
    if strength.norm == 0:
        return {}
    law = Law.constant(strength.norm, relative=True)
    return {p: _addition(_unit(row(vector, p.layer)), law) for p in points}


def ablate(item: Ablate, sources: Sources) -> Blocks:
    vector = sources.vector(item.vector, "vector")
    points = vector_points(item, [("vector", vector)], sources.model)
    if item.strength == 0:
        return {}
    law = Law(slope=-item.strength)
    return {p: _along(_unit(row(vector, p.layer)), law) for p in points}


def project(item: Project, sources: Sources) -> Blocks:
    vector = sources.vector(item.vector, "vector")
    points = vector_points(item, [("vector", vector)], sources.model)
    return {
        p: _along(
            _unit(row(vector, p.layer)), Law.toward(_projection(item, vector, p.layer), item.mode)
        )
        for p in points
    }


def _projection(item: Project, vector: ControlVector, layer: int) -> float:
    """The target projection: a number, or the class mean on the vector's card."""
    if isinstance(item.value, float | int):
        return item.value
    measure = vector.card.measures.get(layer)
    mean = None if measure is None else getattr(measure, item.value)
    if mean is None:
        raise SpecError(
            f"the card of {vector.card.name!r} records no {item.value!r} class mean for layer "
            f"{layer}: give 'value' as a number, or fit the vector with `steer fit`",
            param="/value",
            code="not_measured",
        )
    return float(mean)


def clamp(item: Clamp, sources: Sources) -> Blocks:
    """f ← value on the chosen features, the rest of x untouched (Scaling Monosemanticity)."""
    sae = sources.sae(item.sae)
    point = _sae_point(item, sae, sources.model)
    reads = _pointed(lambda: sae.reads(item.features), "/features")
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


def concept(item: Concept, sources: Sources) -> Blocks:
    """λ·Σ zᵢ·W_dec[i], z the mean latents of the text without the top-k limit (2501.19066)."""
    sae = sources.sae(item.sae)
    point = _sae_point(item, sae, sources.model)
    if sources.encode_text is None:
        raise Unsupported("a concept needs a model to read its text: none is attached here")
    latents = sae.latents(sources.encode_text(item.text, point)).mean(0)
    if item.contrast is not None:
        latents = latents - sae.latents(sources.encode_text(item.contrast, point)).mean(0)
    active = latents.nonzero()[:, 0]
    if item.strength == 0 or len(active) == 0:
        return {}
    return {point: Block(shift=item.strength * (latents[active] @ sae.writes(active.tolist())))}


def swap(item: Swap, sources: Sources) -> Blocks:
    """x + β‖x‖(v̂_add − v̂_remove) (LRC, 2311.08968)."""
    pair = [
        ("remove", sources.vector(item.remove, "remove")),
        ("add", sources.vector(item.add, "add")),
    ]
    points = vector_points(item, pair, sources.model)
    if item.strength == 0:
        return {}
    law = Law.constant(item.strength, relative=True)
    return {
        p: _addition(_unit(row(pair[1][1], p.layer)) - _unit(row(pair[0][1], p.layer)), law)
        for p in points
    }


def low_rank(item: LowRank, sources: Sources) -> Blocks:
    """x + Rᵀ(Wx + b − Rx) (LoReFT, 2404.03592)."""
    adapter = _pointed(lambda: sources.library.low_rank(item.adapter), "/adapter")
    site = item.site or adapter.card.site
    named = item.layers if isinstance(item.layers, tuple) else None
    blocks: Blocks = {}
    for layer in named or adapter.card.layers:
        point = HookPoint(layer, site)
        sources.model.check_point(point, param="/layers" if named else "/adapter")
        if layer not in adapter.parts or adapter.card.width != sources.model.width(site):
            raise IncompatibleArtefact(
                f"the adapter {item.adapter!r} has layers {list(adapter.parts)} of width "
                f"{adapter.card.width}; layer {layer} at {site} needs width "
                f"{sources.model.width(site)}",
                code="wrong_width",
                param="/adapter",
            )
        rotation, weight, bias = adapter.parts[layer]
        laws = [Law(bias=value) for value in bias.tolist()]
        blocks[point] = Block.of_edits(weight - rotation, rotation, laws)
    return blocks


def rotate(item: Rotate, sources: Sources) -> Blocks:
    """Rotation by θ in span(a, b): two rank-1 edits on an orthonormal basis of the plane."""
    pair = [
        ("vector", sources.vector(item.vector, "vector")),
        ("toward", sources.vector(item.toward, "toward")),
    ]
    points = vector_points(item, pair, sources.model)
    angle = math.radians(item.degrees)
    if item.degrees == 0:
        return {}
    blocks: Blocks = {}
    for point in points:
        a = _unit(row(pair[0][1], point.layer).double())
        b = row(pair[1][1], point.layer).double()
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


def patch(item: Patch, sources: Sources) -> Blocks:
    """x ← state (Patchscopes, 2401.06102)."""
    vector = sources.vector(item.vector, "vector")
    points = vector_points(item, [("vector", vector)], sources.model)
    return {p: Block(shift=row(vector, p.layer), replace=True) for p in points}


def _sae_point(item: Clamp | Concept, sae: SAE, model: ModelInfo) -> HookPoint:
    point = HookPoint(sae.layer, sae.site)
    if item.layers not in (None, "all", (sae.layer,)) or item.site not in (None, sae.site):
        raise SpecError(
            f"the SAE {item.sae!r} reads {point.site} of layer {point.layer} and acts only there: "
            "leave out 'layers' and 'site'",
            param="/layers" if item.site in (None, sae.site) else "/site",
            code="not_the_saes_layer",
        )
    model.check_point(point, param="/sae")
    if sae.d_in != model.width(point.site):
        raise IncompatibleArtefact(
            f"the SAE {item.sae!r} has width {sae.d_in}; {point.site} of {model.name!r} has width "
            f"{model.width(point.site)}",
            code="wrong_width",
            param="/sae",
        )
    return point


def _unit(direction: Tensor) -> Tensor:
    length: Tensor = direction.norm()
    return direction / length


def _along(unit: Tensor, law: Law) -> Block:
    return Block.of_edits(unit[None], unit[None], [law])


def _addition(write: Tensor, law: Law) -> Block:
    return Block.of_edits(torch.zeros_like(write)[None], write[None], [law])


def _pointed(call: Callable[[], Result], pointer: str) -> Result:
    """The result of `call`; its errors point at `pointer` where they point nowhere."""
    try:
        return call()
    except SteerError as error:
        raise error.at(pointer) from None
