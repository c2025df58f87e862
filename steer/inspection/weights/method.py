"""A model's weights read as tokens (2209.02535): what a neuron, a head or a vector writes, and what
a neuron or a head makes of a token.

What is read is the weights alone, at the scale that norms have at a state of size 1: which tokens a
part would speak for, not what it does in a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library, MemoryLibrary
from steer.engines.base import Engine
from steer.errors import IncompatibleArtefact, SpecError, SteerError, Unsupported, pointer
from steer.inspection.method import Inspection, at_field
from steer.inspection.next_token import chosen_token
from steer.inspection.weights.drawing import weights_heat_map
from steer.inspection.weights.embeddings import Embeddings
from steer.inspection.weights.looking import (
    looks_of,
    looks_of_heads,
    sought_by_chance,
    strongest_by_chance,
    strongest_of,
)
from steer.inspection.weights.pairs import TokenPair, spread_of, strongest_pairs
from steer.inspection.weights.parts import (
    activations_of,
    values_read,
    values_written,
    written,
)
from steer.inspection.weights.request import WeightsRequest
from steer.inspection.weights.result import (
    HeadReading,
    ScoredPair,
    TokenReading,
    WeightsResult,
)
from steer.inspection.weights.scored import named_tokens, scored
from steer.inspection.weights.vocabulary import Vocabulary, standings
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.points import row
from steer.spec import Site

_WRITTEN: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""The sites whose vectors are vectors of the residual stream."""

_NUMBERS_AT_ONCE = 1 << 27
"""Of a table's heads so many as fit into 1 GiB, what they read and what they write."""


def weights(
    engine: Engine,
    request: WeightsRequest,
    *,
    library: Library | None = None,
    plans: PlanCache | None = None,  # noqa: ARG001 (as every inspection is called)
) -> WeightsResult:
    """What `request` names, as tokens.

    Raises `SteerError` with a pointer into the request, `Unsupported` where the model's head is not
    linear behind its norm, or where the engine does not give the part's weights.
    """
    WEIGHTS.require(engine)
    if request.vector is not None:
        return _of_vector(engine, request, library or MemoryLibrary())
    _check_part(engine, request)
    with at_field(_field(request)):
        return _of_part(engine, request)


def _of_part(engine: Engine, request: WeightsRequest) -> WeightsResult:
    """A neuron, a head, or a table of heads."""
    if request.circuit == "qk":
        of_looks = _looks_of_heads if request.head is None else _looks_of_head
        return of_looks(engine, request)
    vocabulary = Vocabulary.of(engine)
    if request.neuron is not None:
        return _of_neuron(engine, request, vocabulary)
    if request.head is not None:
        return _of_head(engine, request, vocabulary)
    return _of_heads(engine, request, vocabulary)


def _field(request: WeightsRequest) -> str:
    """What asks for a part of the model."""
    if request.circuit == "qk":
        return "/circuit"
    return "/neuron" if request.neuron is not None else "/head"


def _check_part(engine: Engine, request: WeightsRequest) -> None:
    """Raises unless the model has the neuron or head, and the engine gives its weights."""
    name = "neuron" if request.neuron is not None else "head"
    site: Site = "mlp_act" if name == "neuron" else "head_out"
    able = engine.capabilities
    looks = request.circuit == "qk"
    if looks and not able.attention:
        raise Unsupported(
            f"the {able.engine} engine does not tell what heads attend by: read the circuit 'ov', "
            "or use the transformers engine",
            code="unsupported_inspection",
            param="/circuit",
        )
    if looks:
        engine.info.check_point(HookPoint(request.layer or 0), param="/layer")
    elif able.carries:
        engine.info.check_point(HookPoint(request.layer or 0), param="/layer")
        engine.info.check_point(HookPoint(request.layer or 0, site), param=pointer(name))
    if not looks and (not able.carries or site not in able.projections):
        advice = " or the circuit 'qk' of a head" if able.attention else ""
        raise Unsupported(
            f"the {able.engine} engine does not give the weights of a {name}: read a 'vector'"
            f"{advice} here, or use the transformers engine",
            code="unsupported_inspection",
            param=pointer(name),
        )
    number = getattr(request, name)
    count = engine.info.d_mlp if name == "neuron" else engine.info.n_heads
    if number is not None and number >= (count or 0):
        raise SpecError(
            f"{name} {number} is out of range: a layer of {engine.info.name!r} has {name}s "
            f"0 to {(count or 0) - 1}",
            param=pointer(name),
            code=f"{name}_out_of_range",
        )


def _of_vector(engine: Engine, request: WeightsRequest, library: Library) -> WeightsResult:
    vector = _vector(engine, request, library)
    layers = sorted(vector.directions) if request.layer is None else [request.layer]
    vocabulary = Vocabulary.of(engine)
    rows = torch.stack([row(vector, layer) for layer in layers])
    readings = [
        _written(engine, request, vocabulary, rows[n : n + 1], HookPoint(layer, vector.card.site))
        for n, layer in enumerate(layers)
    ]
    return WeightsResult(
        model=engine.info.name,
        part=f"vector {request.vector}",
        readings=tuple(readings),
        by_chance=vocabulary.by_chance,
    )


def _vector(engine: Engine, request: WeightsRequest, library: Library) -> ControlVector:
    """The vector that is named, checked."""
    try:
        vector = library.vector(str(request.vector))
    except SteerError as error:
        raise error.at("/vector") from None
    if request.layer is not None:
        engine.info.check_point(HookPoint(request.layer), param="/layer")
        try:
            row(vector, request.layer)
        except SteerError as error:
            raise error.at("/layer") from None
    if vector.card.site not in _WRITTEN:
        raise SpecError(
            f"the vector {request.vector!r} belongs to {vector.card.site}, which holds no vectors "
            f"of the residual stream: name one of {', '.join(_WRITTEN)}",
            param="/vector",
            code="wrong_site",
        )
    if vector.card.width != engine.info.d_model:
        raise IncompatibleArtefact(
            f"the vector {request.vector!r} has width {vector.card.width}; the stream of "
            f"{engine.info.name!r} has width {engine.info.d_model}",
            param="/vector",
            code="wrong_width",
        )
    return vector


def _of_neuron(engine: Engine, request: WeightsRequest, vocabulary: Vocabulary) -> WeightsResult:
    layer, neuron = request.layer or 0, request.neuron or 0
    point = HookPoint(layer, "mlp_act")
    value = written(engine, point, range(neuron, neuron + 1), param="/neuron")
    site, activations = activations_of(engine, Embeddings(engine), layer, neuron)
    reads = _reading(engine, request, activations, what="reads", layer=layer, site=site)
    writes = _written(engine, request, vocabulary, value, HookPoint(layer, "mlp_out"))
    return WeightsResult(
        model=engine.info.name,
        part=f"layer {layer}, neuron {neuron}",
        readings=(reads, writes),
        by_chance=vocabulary.by_chance,
    )


def _of_head(engine: Engine, request: WeightsRequest, vocabulary: Vocabulary) -> WeightsResult:
    layer, head = request.layer or 0, request.head or 0
    inputs = _inputs(engine, request)
    writes = values_written(engine, vocabulary, layer, head)
    reads = values_read(engine, Embeddings(engine), layer, range(head, head + 1))[:, 0]
    most, least = strongest_pairs(reads, writes, request.top)
    readings = [
        _reading(
            engine,
            request,
            writes @ reads[token],
            what="writes",
            layer=layer,
            site="attn_out",
            input=named_tokens(engine, [token])[0],
        )
        for token in inputs
    ]
    return WeightsResult(
        model=engine.info.name,
        part=f"layer {layer}, head {head}",
        readings=tuple(readings),
        heads=(_head_reading(layer, head, reads, writes),),
        most=_pairs(engine, most),
        least=_pairs(engine, least),
        by_chance=vocabulary.by_chance if readings else None,
    )


def _of_heads(engine: Engine, request: WeightsRequest, vocabulary: Vocabulary) -> WeightsResult:
    count, embeddings = engine.info.n_heads or 1, Embeddings(engine)
    numbers = 2 * engine.info.vocab_size * (engine.info.head_dim or 1)
    step = max(1, _NUMBERS_AT_ONCE // numbers)
    found: list[HeadReading] = []
    for layer in _layers(engine, request):
        for start in range(0, count, step):
            heads = range(start, min(start + step, count))
            reads = values_read(engine, embeddings, layer, heads)
            found += [
                _head_reading(
                    layer, head, reads[:, n], values_written(engine, vocabulary, layer, head)
                )
                for n, head in enumerate(heads)
            ]
    return WeightsResult(model=engine.info.name, part=_which_heads(request), heads=tuple(found))


def _looks_of_heads(engine: Engine, request: WeightsRequest) -> WeightsResult:
    """What heads look for: a table of all."""
    table = [
        _head_reading(layer, head, *looks)
        for layer in _layers(engine, request)
        for head, looks in enumerate(looks_of_heads(engine, Embeddings(engine), layer))
    ]
    part = f"{_which_heads(request)}, QK"
    return WeightsResult(model=engine.info.name, part=part, heads=tuple(table))


def _looks_of_head(engine: Engine, request: WeightsRequest) -> WeightsResult:
    layer, head = request.layer or 0, request.head or 0
    inputs = _inputs(engine, request)
    keys, queries = looks_of(engine, Embeddings(engine), layer, head)
    most, least = strongest_pairs(keys, queries, request.top)
    readings = [
        _reading(
            engine,
            request,
            keys @ queries[token],
            what="seeks",
            layer=layer,
            site="resid_pre",
            input=named_tokens(engine, [token])[0],
        )
        for token in inputs
    ]
    reading = _head_reading(layer, head, keys, queries)
    strongest = strongest_of(keys, queries)
    return WeightsResult(
        model=engine.info.name,
        part=f"layer {layer}, head {head}, QK",
        readings=tuple(readings),
        heads=(
            reading.model_copy(
                update={
                    "strongest": strongest,
                    "strongest_by_chance": strongest_by_chance(keys, queries),
                }
            ),
        ),
        most=_pairs(engine, most),
        least=_pairs(engine, least),
        by_chance=sought_by_chance(keys) if readings else None,
    )


def _inputs(engine: Engine, request: WeightsRequest) -> list[int]:
    return [
        chosen_token(engine, choice, param=pointer("inputs", n))
        for n, choice in enumerate(request.inputs)
    ]


def _layers(engine: Engine, request: WeightsRequest) -> Sequence[int]:
    """Those of a table of heads."""
    return range(engine.info.n_layers) if request.layer is None else [request.layer]


def _which_heads(request: WeightsRequest) -> str:
    return "all heads" if request.layer is None else f"heads of layer {request.layer}"


def _head_reading(
    layer: int,
    head: int,
    reads: Float[Tensor, "vocab head_dim"],
    writes: Float[Tensor, "vocab head_dim"],
) -> HeadReading:
    spread = spread_of(reads, writes)
    return HeadReading(
        layer=layer,
        head=head,
        copying=spread.copying,
        own=spread.own,
        mean=spread.mean,
        deviation=spread.deviation,
    )


def _written(
    engine: Engine,
    request: WeightsRequest,
    vocabulary: Vocabulary,
    vector: Float[Tensor, "1 d_model"],
    point: HookPoint,
) -> TokenReading:
    """A vector of the stream as tokens."""
    scores = vocabulary.scores(vector)[0]
    return _reading(
        engine,
        request,
        scores,
        what="writes",
        layer=point.layer,
        site=point.site,
        norm=float(vector.double().norm()),
    )


def _reading(
    engine: Engine, request: WeightsRequest, scores: Float[Tensor, " vocab"], **fields: object
) -> TokenReading:
    """The strongest of one score per token."""
    count = min(request.top, len(scores))
    most, least = scores.topk(count), (-scores).topk(count)
    return TokenReading.model_validate(
        {
            **fields,
            "standing": float(standings(scores.double()[None]).abs().max()),
            "most": scored(engine, most.indices.tolist(), most.values.tolist()),
            "least": scored(engine, least.indices.tolist(), (-least.values).tolist()),
        }
    )


def _pairs(engine: Engine, pairs: Sequence[TokenPair]) -> tuple[ScoredPair, ...]:
    inputs = named_tokens(engine, [pair.input for pair in pairs])
    outputs = named_tokens(engine, [pair.output for pair in pairs])
    return tuple(
        ScoredPair(input=one, output=other, score=pair.score)
        for one, other, pair in zip(inputs, outputs, pairs, strict=True)
    )


def _possible(able: Capabilities) -> bool:
    return able.no_unembedding is None and "resid_pre" in able.captures


WEIGHTS = Inspection(
    name="weights",
    summary="What a neuron, a head or a vector writes and reads, as tokens, from weights alone.",
    request=WeightsRequest,
    result=WeightsResult,
    run=weights,
    draw=weights_heat_map,
    possible=_possible,
)
