"""The nodes of a flow: the stream and the MLPs at the positions that are followed, and the stream
where edges come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.inspection.attribution.parts import States
from steer.inspection.flow.result import FlowEdge, FlowNode, mlp_id, stream_id
from steer.inspection.next_token import top_tokens
from steer.inspection.weights.scored import highest_tokens
from steer.inspection.weights.vocabulary import Vocabulary
from steer.model import HookPoint


def flow_nodes(
    engine: Engine,
    vocabulary: Vocabulary,
    states: States,
    directions: Mapping[int, Float[Tensor, " d_model"]],
    edges: Iterable[FlowEdge],
    top: int,
) -> tuple[FlowNode, ...]:
    """The nodes by layer and position, an MLP's before the stream that it is added to.

    `states` are those of the first tokens, `directions` by the positions that are followed.
    """
    layers = range(engine.info.n_layers)
    streams = {(layer, at) for at in directions for layer in (-1, *layers)}
    streams |= {(one.layer - 1, one.reads) for one in edges}
    found = _streams(engine, states, directions, sorted(streams), top)
    mlps = sorted((layer, at) for at in directions for layer in layers)
    found += _mlps(vocabulary, states, directions, mlps, top)
    return tuple(sorted(found, key=lambda one: (_depth(one), one.position, one.part == "residual")))


def _depth(node: FlowNode) -> int:
    return -1 if node.part == "embedding" else node.layer


def _streams(
    engine: Engine,
    states: States,
    directions: Mapping[int, Float[Tensor, " d_model"]],
    places: list[tuple[int, int]],
    top: int,
) -> list[FlowNode]:
    rows = torch.stack([_stream(states, layer, at) for layer, at in places])
    per_pass = max(1, (1 << 24) // engine.info.vocab_size)
    said = [
        one
        for part in torch.split(rows, per_pass)
        for one in top_tokens(engine.unembed(part), engine.tokenizer, top)
    ]
    return [
        FlowNode(
            id=stream_id(layer, at),
            part="embedding" if layer < 0 else "residual",
            layer=max(layer, 0),
            position=at,
            share=float(row.double().cpu() @ directions[at]) if at in directions else None,
            says=tokens,
        )
        for (layer, at), row, tokens in zip(places, rows, said, strict=True)
    ]


def _mlps(
    vocabulary: Vocabulary,
    states: States,
    directions: Mapping[int, Float[Tensor, " d_model"]],
    places: list[tuple[int, int]],
    top: int,
) -> list[FlowNode]:
    rows = [states[HookPoint(layer, "mlp_out")][at].double().cpu() for layer, at in places]
    return [
        FlowNode(
            id=mlp_id(layer, at),
            part="mlp",
            layer=layer,
            position=at,
            share=float(row @ directions[at]),
            writes=tokens,
        )
        for (layer, at), row, tokens in zip(
            places, rows, highest_tokens(vocabulary, rows, top), strict=True
        )
    ]


def _stream(states: States, layer: int, position: int) -> Float[Tensor, " d_model"]:
    point = HookPoint(0, "resid_pre") if layer < 0 else HookPoint(layer, "resid_post")
    return states[point][position]
