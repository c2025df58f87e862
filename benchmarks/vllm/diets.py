"""What a batch asks for: one spec for each request, or None where it is not steered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.vllm.shapes import FEATURES, READ_FEATURES, VECTORS, Shape

Spec = dict[str, Any]
Batch = list[Spec | None]
CLAMPED = 8
_PLAIN_EVERY = 8
_FADED = 10_000
"""The token at which a ramp ends: one that no benchmark comes to."""
_EVERYWHERE = {"phases": ["prompt", "generation"]}


@dataclass(frozen=True)
class Diet:
    """`aims` are the largest extra cost allowed, by mode, as a share of the plain step. Of a
    `control` the second engine is a plain one too: what it shows is what starts differ by.
    `inspect` is what each request asks to be read of every token that is generated."""

    name: str
    batch: Callable[[Shape, int], Batch]
    aims: dict[str, float]
    control: bool = False
    inspect: Callable[[Shape], Spec] | None = None


def _one(item: Spec, **rest: Any) -> Spec:
    return {"interventions": [item], "where": _EVERYWHERE, **rest}


def _strength(n: int) -> float:
    return round(0.02 + 0.001 * n, 4)


def add(n: int, layers: Sequence[int] | str) -> Spec:
    """The n-th of any number of distinct constant additions."""
    layers = layers if isinstance(layers, str) else list(layers)
    vector = f"v{n % VECTORS}"
    return _one({"kind": "add", "vector": vector, "strength": _strength(n), "layers": layers})


def distinct(shape: Shape, batch: int, count: int) -> Batch:
    """`count` distinct additions at one layer, in turn."""
    return [add(n % count, [shape.middle]) for n in range(batch)]


def _triggered(shape: Shape, n: int) -> Spec:
    tokens = list(range(3, shape.vocabulary, shape.vocabulary // 16))
    return {**add(n, [shape.middle]), "where": {"tokens": tokens}}


def triggered(shape: Shape, batch: int) -> Batch:
    """Additions that look at every token's id, so that no step is like the one before."""
    return [_triggered(shape, n) for n in range(batch)]


def fading(shape: Shape, batch: int) -> Batch:
    """Additions of which every token gets another share."""
    ramp = [[0, 1.0], [_FADED, 0.25]]
    return [{**one, "ramp": ramp} for one in distinct(shape, batch, batch) if one is not None]


def _clamp(n: int) -> Spec:
    features = [(n * CLAMPED + k) % FEATURES for k in range(CLAMPED)]
    return _one({"kind": "clamp", "sae": "jumprelu", "features": features, "value": 0.5})


def of_kinds(shape: Shape, n: int) -> dict[str, Spec]:
    """The n-th spec of every kind but `concept`, which is a constant addition by the time it runs,
    and of gates, triggers, competing features and kept norms, by a name for each."""
    layers, here = [shape.middle, shape.middle + 1], {"layers": [shape.middle]}
    first, second, size = f"v{n % VECTORS}", f"v{(n + 1) % VECTORS}", _strength(n)

    def at(kind: str, **fields: Any) -> Spec:
        return _one({"kind": kind, "layers": layers, **fields})

    def gate(scope: str) -> Spec:
        return {"vector": second, "above": 0.0, "layer": 0, "scope": scope}

    ablation = at("ablate", vector=first, strength=size)
    competing = {"sae": "topk", "features": [n % FEATURES, (n + 9) % FEATURES], "value": 0.5}
    written = {"read": second, "write": first, "strength": size}
    return {
        "ablate": ablation,
        "add": at("add", vector=first, strength=size),
        "clamp": _clamp(n),
        "project": at("project", vector=first, value=size, mode="at_least"),
        "add, by norm": at("add", vector=first, strength={"norm": size}),
        "rotate": at("rotate", vector=first, toward=second, degrees=5.0 + n),
        "swap": at("swap", remove=first, add=second, strength=size),
        "low_rank": _one({**here, "kind": "low_rank", "adapter": "reft", "strength": 1.0 - size}),
        "ablate, gated by token": {**ablation, "when": gate("token")},
        "add, where a token triggers": _triggered(shape, n),
        "ablate, norm kept": {**ablation, "norm": "preserve"},
        "clamp, competing": _one({"kind": "clamp", **competing, "mode": "at_least"}),
        "patch": {**at("patch", vector=first), "where": {"positions": [[1, 2 + n // VECTORS]]}},
        "exchange": at("exchange", vector=first, toward=second, strength=size),
        "read_write": at("read_write", **written, measure="cosine"),
        "affine": _one({**here, "kind": "affine", "map": "map", "strength": size}),
        "add, gated by prompt": {**at("add", vector=first, strength=size), "when": gate("prompt")},
    }


def all_kinds(shape: Shape, batch: int) -> Batch:
    """As many distinct specs, the kinds in turn."""
    return [(found := list(of_kinds(shape, n).values()))[n % len(found)] for n in range(batch)]


def _mixed(shape: Shape, batch: int) -> Batch:
    """All kinds, and requests without steering between them."""
    return [None if n % _PLAIN_EVERY == _PLAIN_EVERY - 1 else spec
            for n, spec in enumerate(all_kinds(shape, batch))]  # fmt: skip


CONSTANT, OTHER = {"compiled": 0.005}, {"compiled": 0.03}
NOTHING = Diet("nothing steered", lambda _, b: [None] * b, {"compiled": 0.005, "eager": 0.01})
CONTROL = Diet("plain beside plain", lambda _, b: [None] * b, {}, control=True)
FADING = Diet("each its own vector, one layer, fading", fading, CONSTANT)
TRIGGERED = Diet("each its own vector where a token triggers", triggered, CONSTANT)
DIETS = (
    NOTHING,
    Diet("one shared vector, every layer", lambda _, b: [add(0, "all")] * b, CONSTANT),
    Diet("each its own vector, one layer", lambda s, b: distinct(s, b, b), CONSTANT),
    Diet(
        "each its own vector, every layer", lambda _, b: [add(n, "all") for n in range(b)], CONSTANT
    ),
    Diet("all kinds mixed", _mixed, OTHER),
    Diet(f"{CLAMPED} shared features clamped", lambda _, b: [_clamp(0)] * b, OTHER),
    Diet(
        f"each its own {CLAMPED} features clamped", lambda _, b: list(map(_clamp, range(b))), OTHER
    ),
    FADING,
    TRIGGERED,
)
READING = (
    Diet(
        "4 projections read of each token",
        lambda _, b: [None] * b,
        {"compiled": 0.02},
        inspect=lambda s: {
            "projections": [{"vector": f"v{n}", "layers": [s.middle]} for n in range(4)]
        },
    ),
    Diet(
        f"the 5 most active of {READ_FEATURES:,} features read of each token",
        lambda _, b: [None] * b,
        {"compiled": 0.05},
        inspect=lambda _: {"features": [{"sae": "wide", "top": 5}]},
    ),
)
DISTINCT_COUNTS = (1, 8, 32, 64)
