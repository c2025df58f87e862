"""What looks inside attention and MLP, as numbers by name, so that engines in other processes, of
other dtypes and with quantised weights can be held against the transformers engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steer.engines.base import CaptureRequest
from steer.errors import SteerError, Unsupported
from steer.inspection import (
    AttributionRequest,
    FlowRequest,
    WeightsRequest,
    attribution,
    flow,
    weights,
)
from steer.model import PROJECTED_SITES, HookPoint
from steer.spec import Site

FACT = {"text": "The capital of France is"}
EDGES = 512
"""All that the fact has on the demo model."""
CARRIED: tuple[tuple[Site, Site], ...] = (
    ("resid_pre", "head_out"),
    ("resid_pre", "resid_post"),
    ("resid_mid", "mlp_act"),
    ("head_out", "attn_out"),
    ("mlp_act", "mlp_out"),
)
NEURON, HEAD = (4, 370), (3, 2)


def matrices(
    engine: Any, layers: Iterable[int] = (0, 3, 5), refusals: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Projections, carried states, queries and keys of some layers, of random states, and what
    heads attend to in a prompt. What is refused goes into `refusals`, where these are given: the
    code, by name."""
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(6)

    def note(name: str, ask: Callable[[], Tensor]) -> None:
        try:
            found[name] = ask()
        except Unsupported as error:
            if refusals is None:
                raise
            refusals[name] = error.code

    for layer in layers:
        for start, end in CARRIED:
            ends = HookPoint(layer, start), HookPoint(layer, end)
            states = torch.randn(5, engine.info.width(start), generator=generator)
            note(f"{ends[0]} to {ends[1]}", partial(engine.carry, *ends, states))
        for site in PROJECTED_SITES:
            states = torch.randn(5, engine.info.width(site), generator=generator)
            note(f"behind {layer}.{site}", partial(engine.project, HookPoint(layer, site), states))
        states = torch.randn(5, engine.info.d_model, generator=generator)
        for name in ("queries", "keys"):
            note(
                f"{name} of {layer}",
                lambda layer=layer, states=states, name=name: getattr(
                    engine.queries_and_keys(layer, states), name
                ),
            )
    prompts = [tuple(range(40, 75)), (7,)]
    request = CaptureRequest(prompts, attention=tuple(layers))
    for number, one in enumerate(engine.capture(request)):
        for layer, attended in one.attention.items():
            found[f"weights of {layer}, {number}"] = attended.weights
            found[f"values of {layer}, {number}"] = attended.values
    return found


def inspections(engine: Any) -> dict[str, Tensor]:
    """An attribution, a flow, and weights as tokens, on the demo model."""
    return attributed(engine) | flown(engine) | looked_at(engine)


def attributed(engine: Any, **fields: Any) -> dict[str, Tensor]:
    """The shares of heads and of the strongest neurons."""
    asked = {**FACT, "token": " Paris", "against": " London", "heads": True, "neurons": 8}
    result = attribution(engine, AttributionRequest.model_validate(asked | fields))
    neurons = sorted((one.layer, one.neuron, one.share) for one in result.neurons or ())
    found = {
        "heads' shares": torch.tensor([one.heads or () for one in result.layers]),
        "unexplained": torch.tensor([1 + result.unexplained]),  # so that nothing is something
        "neurons": torch.tensor([[layer, neuron] for layer, neuron, _ in neurons]),
        "neurons' shares": torch.tensor([share for *_, share in neurons]),
    }
    return {name: one for name, one in found.items() if one.numel()}


def flown(engine: Any) -> dict[str, Tensor]:
    """The weights and shares of all edges into the last token."""
    result = flow(engine, FlowRequest.model_validate({**FACT, "edges": EDGES}))
    places = len(result.tokens)
    shape = engine.info.n_layers, engine.info.n_heads, places
    told, shares = torch.zeros(shape), torch.zeros(shape)
    for edge in result.edges:
        told[edge.layer, edge.head, edge.reads] = edge.weight
        shares[edge.layer, edge.head, edge.reads] = edge.share
    assert len(result.edges) == told.numel()
    return {"edges' weights": told, "edges' shares": shares}


def looked_at(engine: Any) -> dict[str, Tensor]:
    """A neuron, a head both ways, and a table of heads, with the tokens that are told first."""
    found: dict[str, Tensor] = {}
    layer, head = HEAD
    asked: dict[str, dict[str, Any]] = {
        "neuron": {"layer": NEURON[0], "neuron": NEURON[1]},
        "ov": {"layer": layer, "head": head, "inputs": [" France"]},
        "qk": {"layer": layer, "head": head, "inputs": [" France"], "circuit": "qk"},
        "table": {"layer": layer},
    }
    for name, fields in asked.items():
        result = weights(engine, WeightsRequest.model_validate({**fields, "top": 5}))
        for reading in result.readings:
            found[f"{name} {reading.what}"] = torch.tensor(
                [one.score for one in (*reading.most, *reading.least)]
            )
            found[f"{name} {reading.what} first"] = torch.tensor([float(reading.most[0].id)])
        pairs = (*(result.most or ()), *(result.least or ()))
        if pairs:
            found[f"{name} pairs"] = torch.tensor([one.score for one in pairs])
        if result.heads:
            numbers = [(one.copying, one.mean, one.deviation) for one in result.heads]
            found[f"{name} heads"] = torch.tensor(numbers)
    return found


def refused(ask: Any) -> tuple[str, str | None]:
    """The code and the field of what refuses `ask()`."""
    try:
        ask()
    except SteerError as error:
        return error.code, error.param
    raise AssertionError("nothing was refused")


def assert_near(mine: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> None:
    """All of `mine` is there, and no further from the `other` than `share` of its largest
    number."""
    assert mine.keys() == other.keys()
    assert mine
    for name, wanted in other.items():
        assert mine[name].shape == wanted.shape, name
        far = float((mine[name].float() - wanted.float()).abs().max())
        assert far <= share * float(wanted.abs().max()), f"{name}: {far}"
