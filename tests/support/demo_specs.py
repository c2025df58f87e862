"""Specs of every kind at every site for the demo model, with the artefacts they name."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from artefacts import (
    random_adapter,
    random_detector,
    random_jacobians,
    random_lens,
    random_map,
    random_sae,
    random_vector,
    rectified_adapter,
    span_vocabulary,
)

from steer.artefacts.detection import Detection
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.token_rows import token_reader
from steer.model import Capabilities, ModelInfo
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.registry.registry import Registry
from steer.spec import ROLES, parse_spec

LAYERS, WIDTH, VOCABULARY = 6, 192, 3072

VECTORS = {f"v{n}": random_vector(n, *range(LAYERS), width=WIDTH) for n in range(4)}
SAES = {
    name: random_sae(name, seed=40 + n, width=WIDTH, layer=2)
    for n, name in enumerate(("standard", "jumprelu", "topk"))
}
LOW_RANKS = {
    "reft": random_adapter(7, 1, 4, width=WIDTH),
    "rectified": rectified_adapter(8, 2, 3, width=WIDTH),
}
MAPS = {"map": random_map(9, 1, 3, width=WIDTH)}
LENSES = {
    "tuned": random_lens(60, LAYERS, WIDTH),
    "jacobian": random_jacobians(61, LAYERS, WIDTH),
}
DETECTORS = {
    "d0": random_detector(10, 0, width=WIDTH, bias=0.4),
    "d1": random_detector(11, 1, width=WIDTH, bias=-0.3, threshold=0.2),
    "d2": random_detector(12, 0, width=WIDTH, detection=Detection(pooling="max", last=3)),
    "d3": random_detector(13, 1, width=WIDTH, detection=Detection(pooling="mean", last=4)),
    "wide": random_detector(14, 0, width=WIDTH, detection=Detection(pooling="mean", last=10)),
}


def add(vector: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": vector, "layers": [0, 3], "strength": 0.4, **fields}


def ablate(vector: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "ablate", "vector": vector, "layers": [1, 4], **fields}


def one(item: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"interventions": [item], **rest}


SPECS: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "everything": one(add("v0")),
    "every layer": one(add("v1", layers="all", strength=0.1)),
    "prompt only": one(add("v1"), where={"phases": ["prompt"]}),
    "generation only": {
        "interventions": [add("v2"), ablate("v0")],
        "where": {"phases": ["generation"]},
    },
    "two phases": {
        "interventions": [
            add("v0", where={"phases": ["prompt"]}),
            add("v3", where={"phases": ["generation"]}),
            add("v2"),
        ]
    },
    "a window": one(
        add("v3"), where={"positions": [[-2, None]], "except": {"positions": [[4, 6]]}}
    ),
    "token triggers": one(add("v0", strength=-1), where={"tokens": list(range(0, VOCABULARY, 4))}),
    "a prompt gate": one(
        ablate("v2"),
        when={"vector": "v1", "above": 0.0, "layer": 0},
        where={"positions": [[2, None]]},
    ),
    "a prompt gate on what is generated": one(
        add("v2", layers=[1]),
        when={"vector": "v3", "above": 0.0, "layer": 0},
        where={"phases": ["generation"]},
    ),
    "a token gate": one(
        add("v1", layers=[2]), when={"vector": "v0", "below": 0.1, "layer": 1, "scope": "token"}
    ),
    "a token gate on every later layer": one(
        add("v3", layers=[1, 2, 4, 5]),
        when={"vector": "v1", "above": 0.0, "layer": 1, "scope": "token"},
    ),
    "a token gate in the last layers": {
        "interventions": [
            ablate("v0"),
            {
                **add("v2", layers=[5]),
                "when": {"vector": "v3", "above": 0.0, "layer": 4, "scope": "token"},
            },
        ]
    },
    "a detector's gate": one(add("v0", layers=[2, 4]), when={"detector": "d0", "threshold": 0.1}),
    "a detector's gate on each token": {
        "interventions": [
            {**add("v3", layers=[3]), "when": {"detector": "d1", "scope": "token"}},
            ablate("v1", layers=[4]),
        ]
    },
    "an onward gate": one(
        add("v1", layers=[2, 4]),
        when={"vector": "v0", "above": 0.12, "layer": 1, "scope": "onward"},
    ),
    "an onward gate on what is generated": {
        "interventions": [
            {
                **add("v2", layers=[3], where={"phases": ["generation"]}),
                "when": {"detector": "d1", "threshold": 1.0, "scope": "onward"},
            },
            ablate("v3", where={"phases": ["generation"]}),
        ]
    },
    "a gate on the last of a prompt": one(add("v2", layers=[2, 5]), when={"detector": "d2"}),
    "a gate on a mean of each token": {
        "interventions": [
            {**add("v0", layers=[4]), "when": {"detector": "d3", "scope": "token"}},
            ablate("v3", layers=[2]),
        ]
    },
    "a gate from a mean on what is generated": one(
        add("v1", layers=[3]),
        where={"phases": ["generation"]},
        when={"detector": "d3", "scope": "onward"},
    ),
    "a clamp": one({"kind": "clamp", "sae": "jumprelu", "features": [1, 5, 9], "value": 4.0}),
    "a clamp that competes": {
        "interventions": [
            {"kind": "clamp", "sae": "topk", "features": [2, 7], "value": 3.0, "mode": "at_least"},
            add("v3", strength={"norm": 0.2}),
        ]
    },
    "a scaled feature": one(
        {"kind": "clamp", "sae": "standard", "features": [3], "value": 3.0, "mode": "scale"}
    ),
    "norm preserved": {
        "interventions": [add("v0", strength=2), ablate("v1", layers=[0, 1])],
        "norm": "preserve",
    },
    "project": one(
        {"kind": "project", "vector": "v2", "value": 1.0, "mode": "at_least", "layers": [2]}
    ),
    "swap": one({"kind": "swap", "remove": "v0", "add": "v1", "strength": 0.2, "layers": [2, 3]}),
    "rotate": one({"kind": "rotate", "vector": "v0", "toward": "v3", "degrees": 60, "layers": [1]}),
    "rotate to an angle": one(
        {"kind": "rotate", "vector": "v1", "toward": "v2", "degrees": 30, "mode": "to"}
        | {"only": "positive", "layers": [0, 4]}
    ),
    "exchange": one(
        {"kind": "exchange", "vector": "v2", "toward": "v0", "mode": "one_way", "layers": [3]}
    ),
    "read and write": one(
        {"kind": "read_write", "read": "v1", "write": "v3", "bias": 2.0, "strength": 0.05}
        | {"layers": [1, 2]}
    ),
    "read a cosine": one(
        {"kind": "read_write", "read": "v0", "write": "v2", "measure": "cosine"}
        | {"threshold": 0.02, "strength": {"norm": 0.9}, "layers": [2, 4]}
    ),
    "low rank": one({"kind": "low_rank", "adapter": "reft"}),
    "low rank of a ReLU": one({"kind": "low_rank", "adapter": "rectified", "strength": 0.05}),
    "channels": one({"kind": "affine", "map": "map", "strength": 0.3}),
    "patch": one(
        {"kind": "patch", "vector": "v1", "layers": [2], "where": {"positions": [[1, 2]]}}
    ),
    **{
        f"{kind} at {site}": one(
            {"kind": kind, "vector": "v2", "layers": [0, 2, 5], "site": site}
            | ({"strength": 0.4} if kind == "add" else {})
        )
        for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out")
        for kind in ("add", "ablate")
    },
    "a fade-out": one(add("v2", strength=1), ramp=[[2, 1], [10, 0]]),
    "ramps of a clamp and in front of a norm": {
        "interventions": [
            {"kind": "clamp", "sae": "topk", "features": [2, 7], "value": 3.0},
            {**ablate("v0"), "ramp": [[0, 0], [6, 1], [9, 0.3]]},
        ],
        "norm": "preserve",
        "ramp": [[0, 0.25], [4, 1]],
    },
    "a ramp behind a gate": one(
        add("v1", layers=[2], ramp=[[0, 0], [5, 0.8]]),
        when={"vector": "v0", "below": 0.1, "layer": 1, "scope": "token"},
    ),
}


SPANS: dict[str, dict[str, Any]] = {
    "after a text": one(add("v0"), where={"after": ["<a>", "ba<"]}),
    "before token ids": one(add("v1"), where={"before": [[5], [7, 9]]}),
    "between texts": {
        "interventions": [add("v2"), ablate("v0", where={"between": [["<", "b"]]})],
        "where": {"between": [["<a>", "</a>"], ["bb", "<<"]]},
    },
    "outside a span": one(add("v3"), where={"outside": [["<a>", "</a>"]]}),
    "a span of the answer": one(
        add("v0", strength=-1),
        where={"phases": ["generation"], "except": {"between": [["a", "b"]]}},
    ),
    "every third token": one(add("v1"), where={"every": {"nth": 3, "first": 20}}),
    "the first tokens": one(ablate("v2"), where={"every": {"first": 4}}),
    "a user's words": one(add("v2", strength=1), where={"roles": ["user", "assistant"]}),
    "not a system's words": {
        "interventions": [add("v3"), add("v1", where={"roles": ["tool"], "after": ["ab"]})],
        "where": {"except": {"roles": ["system"]}},
    },
    "a prompt gate between texts": one(
        add("v2", layers=[1]),
        when={"vector": "v3", "above": 0.0, "layer": 0},
        where={"between": [["<", ">"]]},
    ),
}
TOKENS: dict[str, dict[str, Any]] = {
    "a token": one(add({"token": 700}, strength={"norm": 0.3}, layers=[3])),
    "tokens of a lens": {
        "interventions": [
            {"kind": "exchange", "vector": {"token": 900, "lens": "tuned"}, "layers": [2]}
            | {"toward": {"token": 1200, "lens": "tuned"}},
            ablate({"token": 40, "lens": "jacobian"}),
            {"kind": "swap", "remove": "v0", "add": {"token": 41}, "layers": [5]},
        ],
        "where": {"positions": [[1, None]]},
    },
    "a gate on a token": one(
        add("v2", layers=[4]),
        when={"vector": {"token": 77, "lens": "jacobian"}, "above": 0.0, "layer": 1}
        | {"scope": "token"},
    ),
}
"""Specs whose vectors are tokens of a lens: they need the engine's own output matrix."""

PIECES = span_vocabulary(VOCABULARY)
"""What tokens stand for in `SPANS`: texts that occur are rare in the words of the model."""


def span_plans(model: ModelInfo, capabilities: Capabilities) -> dict[str, SteeringPlan]:
    cache = PlanCache(LIBRARY, model, replace(capabilities, roles=ROLES), vocabulary=lambda: PIECES)
    return {name: cache.plan(parse_spec(spec)) for name, spec in SPANS.items()}


def token_plans(engine: Engine) -> dict[str, SteeringPlan]:
    library = MemoryLibrary(VECTORS, lenses=LENSES)
    cache = PlanCache(
        library, engine.info, engine.capabilities, read_token=token_reader(engine, None)
    )
    return {name: cache.plan(parse_spec(spec)) for name, spec in TOKENS.items()}


def register(registry: Registry) -> None:
    """Puts the artefacts that the specs name into a registry."""
    for found in (VECTORS, SAES, LOW_RANKS, MAPS, DETECTORS):
        for name, artefact in found.items():
            registry.add(name, artefact)


LIBRARY = MemoryLibrary(VECTORS, SAES, LOW_RANKS, maps=MAPS, detectors=DETECTORS)


def compiled(plans: PlanCache) -> dict[str, SteeringPlan | None]:
    """Every spec as a plan."""
    return {
        name: None if spec is None else plans.plan(parse_spec(spec)) for name, spec in SPECS.items()
    }


def requests_for(
    plans: dict[str, SteeringPlan | None], count: int, *, seed: int = 0, longest: int = 60
) -> list[GenerationRequest]:
    """Greedy requests with prompts of 1 to `longest` random tokens over all specs, in a random
    order; every fourth asks for sizes."""
    draw = random.Random(seed)
    found = []
    for n in range(count):
        name = list(plans)[n % len(plans)]
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest)))
        sampling = SamplingParams(
            max_tokens=draw.randint(1, 16), temperature=0, logprobs=2, ignore_eos=True
        )
        found.append(
            GenerationRequest(f"{n} {name}", prompt, sampling, plans[name], measure=n % 4 == 3)
        )
    draw.shuffle(found)
    return found
