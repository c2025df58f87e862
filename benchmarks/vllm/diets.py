"""What a batch asks for: one spec for each request, or None where it is not steered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.vllm.shapes import FEATURES, VECTORS, Shape

Spec = dict[str, Any]
Batch = list[Spec | None]
CLAMPED = 8
_EVERYWHERE = {"phases": ["prompt", "generation"]}


@dataclass(frozen=True)
class Diet:
    """`aims` are the largest extra cost allowed, by mode, as a share of the plain step."""

    name: str
    batch: Callable[[Shape, int], Batch]
    aims: dict[str, float]


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


def triggered(shape: Shape, batch: int) -> Batch:
    """Additions that look at every token's id, so that no step is like the one before."""
    tokens = list(range(3, shape.vocabulary, shape.vocabulary // 16))
    return [{**add(n, [shape.middle]), "where": {"tokens": tokens}} for n in range(batch)]


def _clamp(n: int) -> Spec:
    features = [(n * CLAMPED + k) % FEATURES for k in range(CLAMPED)]
    return _one({"kind": "clamp", "sae": "jumprelu", "features": features, "value": 0.5})


def _mixed(shape: Shape, batch: int) -> Batch:
    """Every kind but `concept`, which is a constant addition by the time it runs, and gates,
    triggers, competing features, kept norms and requests without steering."""
    layers = [shape.middle, shape.middle + 1]

    def at(kind: str, **fields: Any) -> Spec:
        return _one({"kind": kind, "layers": layers, **fields})

    def menu(n: int) -> Batch:
        first, second, size = f"v{n % VECTORS}", f"v{(n + 1) % VECTORS}", _strength(n)
        gate = {"vector": second, "above": 0.0, "layer": 0, "scope": "token"}
        window = {"positions": [[1, 2]]}
        competing = {"sae": "topk", "features": [n % FEATURES, (n + 9) % FEATURES], "value": 0.5}
        return [
            at("ablate", vector=first, strength=size),
            at("add", vector=first, strength=size),
            _clamp(n),
            at("project", vector=first, value=size, mode="at_least"),
            at("add", vector=first, strength={"norm": size}),
            None,
            at("rotate", vector=first, toward=second, degrees=5.0 + n),
            at("swap", remove=first, add=second, strength=size),
            _one({"kind": "low_rank", "adapter": "reft"}),
            {**at("ablate", vector=first, strength=size), "when": gate},
            triggered(shape, n + 1)[n],
            {**at("ablate", vector=first, strength=size), "norm": "preserve"},
            _one({"kind": "clamp", **competing, "mode": "at_least"}),
            {**at("patch", vector=first), "where": window},
        ]

    return [(found := menu(n))[n % len(found)] for n in range(batch)]


CONSTANT, OTHER = {"compiled": 0.005}, {"compiled": 0.03}
NOTHING = Diet("nothing steered", lambda _, b: [None] * b, {"compiled": 0.005, "eager": 0.01})
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
)
TRIGGERED = Diet("each its own vector where a token triggers", triggered, CONSTANT)
DISTINCT_COUNTS = (1, 8, 32, 64)
