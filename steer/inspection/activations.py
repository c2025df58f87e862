"""Hidden states themselves: norms, rows, readings along registered directions, SAE features."""

from __future__ import annotations

from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library, MemoryLibrary, labels_of
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.base import Captured, CaptureRequest, Engine
from steer.errors import IncompatibleArtefact, SpecError, SteerError, Unsupported, pointer
from steer.inspection.directions import direction_at, direction_named
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Finite, Inspection, reads_states
from steer.inspection.selection import (
    LayerChoice,
    PositionChoice,
    check_size,
    chosen_points,
    chosen_positions,
    plan_for,
    roles_for,
)
from steer.inspection.state_file import StateFile, StateSelection, state_file
from steer.inspection.token_labels import place_label
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import PromptInput, encode_prompt
from steer.readouts import measures
from steer.spec import Name, Site, SteeringSpec


class ActivationsRequest(PromptInput):
    """What to read at each layer and position.

    `states` returns the rows themselves. Each of `vectors` is read as cosine and as projection on
    its unit direction; a vector that names no explicit `layers` is read where it has a direction.
    `sae` returns the `top_features` most active features of each token, at the SAE's own layer and
    site.
    """

    layers: LayerChoice = "all"
    positions: PositionChoice = "all"
    site: Site = "resid_post"
    states: StrictBool = False
    vectors: Annotated[tuple[Name, ...], Field(max_length=64, fail_fast=True)] = ()
    sae: Name | None = None
    top_features: Annotated[int, Field(strict=True, ge=1, le=256)] = 10
    steering: SteeringSpec | None = None


class LayerActivations(BaseModel):
    """One hook point: a norm for each position, and the float32 rows where asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    site: Site
    norms: tuple[float, ...]
    states: tuple[tuple[float, ...], ...] | None = None


class VectorReading(BaseModel):
    """One vector at one layer: for each position the cosine, and the projection on its unit
    direction (in units of the residual stream)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: str
    layer: int
    cosines: tuple[float, ...]
    projections: tuple[float, ...]


class ActiveFeature(BaseModel):
    """An SAE feature that is active on a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: int
    activation: Finite
    label: FeatureLabel | None = None


class FeatureReading(BaseModel):
    """An SAE's features on each position, the most active first; `active` counts all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: str
    layer: int
    site: Site
    d_sae: int
    active: tuple[int, ...]
    top: tuple[tuple[ActiveFeature, ...], ...]


class ActivationsResult(BaseModel):
    """Everything is listed in the order of `positions`; `tokens` are the whole prompt's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.activations"] = "inspect.activations"
    model: str
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[LayerActivations, ...]
    vectors: tuple[VectorReading, ...] = ()
    features: FeatureReading | None = None
    fingerprint: str | None = None


def activations(
    engine: Engine,
    request: ActivationsRequest,
    *,
    library: Library | None = None,
    plans: PlanCache | None = None,
) -> ActivationsResult:
    """Reads the prompt's states, after the edits of `request.steering` where it has one.

    `library` knows the vectors and the SAE, `plans` what the steering names. Raises `SteerError`
    with a pointer into the request, `TooLarge` where the answer would pass `MAX_NUMBERS`.
    """
    ACTIVATIONS.require(engine)
    known = library or MemoryLibrary()
    prompt = encode_prompt(engine, request)
    points = chosen_points(engine, request.layers, request.site)
    positions = chosen_positions(engine, prompt, request.positions)
    _check_sizes(engine, request, len(points), len(positions))
    vectors = [
        (
            name,
            direction_named(
                engine,
                known,
                name,
                site=request.site,
                points=() if request.layers == "all" else points,
                at=pointer("vectors", place),
            ),
        )
        for place, name in enumerate(request.vectors)
    ]
    sae = None if request.sae is None else _sae(engine, known, request.sae)
    plan = plan_for(engine, request.steering, plans, at="/steering")
    read = points if sae is None else tuple(dict.fromkeys([*points, _point_of(sae)]))
    captured = engine.capture(
        CaptureRequest(
            prompts=[prompt.ids],
            points=read,
            positions=positions,
            plans=[plan],
            roles=[roles_for(plan, prompt)],
        )
    )[0]
    return ActivationsResult(
        model=engine.info.name,
        tokens=prompt.tokens,
        positions=positions,
        layers=tuple(_layer(p, captured.states[p], rows=request.states) for p in points),
        vectors=_readings(vectors, points, captured),
        features=None if sae is None else _features(sae, captured, request, known),
        fingerprint=plan.fingerprint if plan else None,
    )


def activations_file(
    engine: Engine,
    request: ActivationsRequest,
    *,
    library: Library | None = None,  # noqa: ARG001 (as every inspection is called)
    plans: PlanCache | None = None,
) -> StateFile:
    """The states that `request` selects, however many, as a safetensors file.

    Raises `SteerError` with a pointer into the request.
    """
    ACTIVATIONS.require(engine)
    for field in ("vectors", "sae"):
        if getattr(request, field):
            raise Unsupported(
                f"a file of states holds no readings: leave {field!r} out, or ask for JSON",
                param=pointer(field),
                code="unsupported_parameter",
            )
    prompt = encode_prompt(engine, request)
    selected = StateSelection(
        prompt,
        chosen_points(engine, request.layers, request.site),
        chosen_positions(engine, prompt, request.positions),
        plan_for(engine, request.steering, plans, at="/steering"),
    )
    return state_file(engine, selected)


def _check_sizes(engine: Engine, request: ActivationsRequest, layers: int, positions: int) -> None:
    places = [("layers", layers), ("positions", positions)]
    if request.states:
        check_size(
            [*places, ("numbers per state", engine.info.width(request.site))],
            advice="read fewer layers or positions, or 'vectors' instead of 'states'; a server "
            "gives states of any size as a file, with 'Accept: application/octet-stream'",
        )
    check_size(
        [*places, ("readings", 1 + 2 * len(request.vectors))],
        advice="read fewer layers, positions or vectors",
    )
    if request.sae is not None:
        check_size(
            [("positions", positions), ("features", request.top_features)],
            advice="read fewer positions, or lower 'top_features'",
        )


def _sae(engine: Engine, library: Library, name: str) -> SAE:
    try:
        sae = library.sae(name)
        engine.info.check_point(_point_of(sae))
    except SteerError as error:
        raise error.at("/sae") from None
    width = engine.info.width(sae.site)
    if sae.d_in != width:
        raise IncompatibleArtefact(
            f"the SAE {name!r} has width {sae.d_in}; {sae.site} of {engine.info.name!r} has width "
            f"{width}",
            param="/sae",
            code="wrong_width",
        )
    return sae


def _point_of(sae: SAE) -> HookPoint:
    return HookPoint(sae.layer, sae.site)


def _layer(
    point: HookPoint, states: Float[Tensor, "positions width"], *, rows: bool
) -> LayerActivations:
    return LayerActivations(
        layer=point.layer,
        site=point.site,
        norms=tuple(measures.norms(states).tolist()),
        states=tuple(map(tuple, states.tolist())) if rows else None,
    )


def _readings(
    vectors: list[tuple[str, ControlVector]], points: tuple[HookPoint, ...], captured: Captured
) -> tuple[VectorReading, ...]:
    """Each vector at each layer that is read and that it has a direction for."""
    readings = []
    for name, vector in vectors:
        for point in points:
            direction = direction_at(vector, point.layer)
            if direction is None:
                continue
            states = captured.states[point]
            along = measures.projections(states, measures.unit(direction)[None])
            cosines = measures.cosines(along, measures.norms(states))
            readings.append(
                VectorReading(
                    vector=name,
                    layer=point.layer,
                    cosines=tuple(cosines[:, 0].tolist()),
                    projections=tuple(along[:, 0].tolist()),
                )
            )
    return tuple(readings)


def _features(
    sae: SAE, captured: Captured, request: ActivationsRequest, library: Library
) -> FeatureReading:
    labels = labels_of(library, str(request.sae))
    activations = sae.encode(captured.states[_point_of(sae)])
    best = measures.ranked(activations, request.top_features)
    top = [
        tuple(
            ActiveFeature(feature=feature, activation=value, label=labels.get(feature))
            for value, feature in zip(values, features, strict=True)
            if value > 0
        )
        for values, features in zip(best.values.tolist(), best.places.tolist(), strict=True)
    ]
    return FeatureReading(
        sae=str(request.sae),
        layer=sae.layer,
        site=sae.site,
        d_sae=sae.d_sae,
        active=tuple((activations > 0).sum(-1).tolist()),
        top=tuple(top),
    )


def activations_heat_map(result: ActivationsResult) -> HeatMap:
    """Layers × positions of the first vector's cosines.

    Raises `SpecError` where the request read no vector.
    """
    name = result.vectors[0].vector if result.vectors else None
    read = [reading for reading in result.vectors if reading.vector == name]
    if not read:
        raise SpecError(
            "a heat map of activations shows the readings of a vector: name one in 'vectors'",
            param="/vectors",
            code="no_heat_map",
        )
    end = max(0.05, *(abs(cosine) for reading in read for cosine in reading.cosines))
    return HeatMap(
        title=f"Along {name}",
        subtitle=f"{result.model} · {result.layers[0].site} · cosine with the vector",
        row_label="layer",
        column_label="prompt token",
        rows=[str(reading.layer) for reading in read],
        columns=[place_label(result.tokens, position) for position in result.positions],
        values=[reading.cosines for reading in read],
        texts=[[f"{cosine:+.2f}" for cosine in reading.cosines] for reading in read],
        scale="cosine",
        limits=(-end, end),
        diverging=True,
    )


ACTIVATIONS = Inspection(
    name="activations",
    summary="Norms, states, readings along registered vectors, and the active features of an SAE.",
    request=ActivationsRequest,
    result=ActivationsResult,
    run=activations,
    draw=activations_heat_map,
    file=activations_file,
    possible=reads_states,
)
