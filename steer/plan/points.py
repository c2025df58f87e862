"""Where an intervention acts: at the hook points of what its first field names.

Vectors go where the spec or the first one's card says, an SAE acts at its own hook point, an
adapter and a map on their own layers. Errors carry a pointer relative to the intervention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.sae.base import SAE
from steer.errors import IncompatibleArtefact, SpecError, SteerError
from steer.model import HookPoint, ModelInfo
from steer.plan.sources import Named
from steer.references import Reference
from steer.spec import Intervention, TokenVector

Found: TypeAlias = tuple[Reference, Named]


def hook_points(
    item: Intervention, named: Sequence[Found], model: ModelInfo
) -> tuple[HookPoint, ...]:
    """The hook points of `item`, which names `named` (at least one), checked against the model."""
    reference, first = named[0]
    if isinstance(first, SAE):
        return (_sae_point(item, reference, first, model),)
    if isinstance(first, LowRankAdapter | AffineMap):
        return _own_points(item, reference, first, model)
    if item.layers is None:
        check_layers_said(reference, "/layers")
    vectors = [(one.param, found) for one, found in named if isinstance(found, ControlVector)]
    return _vector_points(item, vectors, model)


def row(vector: ControlVector, layer: int) -> Tensor:
    """The direction for `layer`; the only row of a one-row vector serves every layer."""
    if len(vector.directions) == 1:
        return next(iter(vector.directions.values()))
    return vector[layer]


def all_layers(vector: ControlVector, model: ModelInfo) -> tuple[int, ...]:
    """What `"layers": "all"` means for `vector`: a single row may be used on every layer of the
    model, rows of several layers on their own."""
    layers = vector.card.layers
    return tuple(range(model.n_layers)) if len(layers) == 1 else layers


def check_layers_said(reference: Reference, at: str) -> None:
    """Raises `SpecError` (`no_layers`) where `reference` is a token's direction: no card says where
    it acts, so the field at the pointer `at` must."""
    if isinstance(reference.ref, TokenVector):
        field = at.rpartition("/")[2]
        raise SpecError(
            f"the token {reference.ref.token!r} has a direction on every layer that the lens "
            f"reads, and no card that says where to act: give {field!r}, such as a layer in the "
            "middle of the model",
            code="no_layers",
            param=at,
        )


def _vector_points(
    item: Intervention, vectors: Sequence[tuple[str, ControlVector]], model: ModelInfo
) -> tuple[HookPoint, ...]:
    """A vector of one row may be used on any layer; a vector of several only on its own."""
    param, first = vectors[0][0], vectors[0][1].card
    site = item.site or first.site
    if item.layers == "all":
        layers = all_layers(vectors[0][1], model)
    else:
        layers = item.layers or first.used_layers
    points = tuple(HookPoint(layer, site) for layer in layers)
    for point in points:
        model.check_point(point, param="/layers" if item.layers else param)
    for param, vector in vectors:
        if vector.card.width != model.width(site):
            raise IncompatibleArtefact(
                f"the vector {vector.card.name!r} has width {vector.card.width}; "
                f"{site} of {model.name!r} has width {model.width(site)}: "
                "use a vector made for this model and site",
                code="wrong_width",
                param=param,
            )
        try:
            for layer in layers:
                row(vector, layer)
        except SteerError as error:
            raise error.at("/layers") from None
    return points


def _sae_point(item: Intervention, named: Reference, sae: SAE, model: ModelInfo) -> HookPoint:
    """Where `sae` writes, checked with where it reads."""
    acts, reads = sae.write_point, HookPoint(sae.layer, sae.site)
    if item.layers not in (None, "all", (sae.layer,)) or item.site not in (None, acts.site):
        raise SpecError(
            f"the SAE {named.ref!r} reads {reads.site} of layer {reads.layer} and acts only "
            + ("there" if acts == reads else f"at {acts.site} of the same layer")
            + ": leave out 'layers' and 'site'",
            param="/layers" if item.site in (None, acts.site) else "/site",
            code="not_the_saes_layer",
        )
    for point, width in ((reads, sae.d_in), (acts, sae.d_out)):
        model.check_point(point, param=named.param)
        if width != model.width(point.site):
            raise IncompatibleArtefact(
                f"the SAE {named.ref!r} has width {width} at {point.site}; {point.site} of "
                f"{model.name!r} has width {model.width(point.site)}",
                code="wrong_width",
                param=named.param,
            )
    return acts


def _own_points(
    item: Intervention, named: Reference, found: LowRankAdapter | AffineMap, model: ModelInfo
) -> tuple[HookPoint, ...]:
    """Adapters and maps act on the layers that they were made for."""
    card = found.card
    site = item.site or card.site
    layers = item.layers if isinstance(item.layers, tuple) else None
    points = tuple(HookPoint(layer, site) for layer in layers or card.used_layers)
    for point in points:
        model.check_point(point, param="/layers" if layers else named.param)
        if point.layer not in card.layers or card.width != model.width(site):
            raise IncompatibleArtefact(
                f"the {named.param[1:]} {named.ref!r} has layers {list(card.layers)} of width "
                f"{card.width}; layer {point.layer} at {site} needs width "
                f"{model.width(site)}",
                code="wrong_width",
                param=named.param,
            )
    return points
