"""What read-outs must be: an offline capture of the same tokens, and formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from artefacts import random_jacobians, random_lens, random_sae, random_vector
from numpy.typing import NDArray

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Completion, Engine, GenerationRequest
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.readouts.compiler import compile_readouts
from steer.readouts.plan import ReadoutPlan
from steer.readouts.spec import ReadoutSpec
from steer.spec import parse_spec

Numbers = NDArray[np.float64]


def reading_library(width: int, layers: int) -> MemoryLibrary:
    """Vectors, SAEs of every way to read a feature, and a lens of each method."""
    saes = {
        name: random_sae(name, seed=70 + n, width=width, layer=n % layers)
        for n, name in enumerate(("jumprelu", "topk", "standard-centred", "jumprelu-rescaled"))
    }
    return MemoryLibrary(
        {f"v{n}": random_vector(n, *range(layers), width=width) for n in range(4)},
        saes,
        lenses={
            "tuned": random_lens(71, width=width, layers=layers),
            "jacobian": random_jacobians(72, width=width, layers=layers),
        },
    )


EVERYTHING: dict[str, Any] = {
    "projections": [{"vector": "v1", "layers": [0, 2]}, {"vector": "v2", "layers": [2]}],
    "features": [
        {"sae": "jumprelu", "top": 3},
        {"sae": "topk"},
        {"sae": "standard-centred", "features": [4, 0, 7]},
        {"sae": "jumprelu-rescaled", "features": [1]},
        {"sae": "topk", "features": [2, 9]},
    ],
    "lens": {"layers": [0, 2], "top": 4},
    "norms": [0, 1],
}
SEVERAL: Mapping[str, dict[str, Any]] = {
    "norms": {"norms": [1]},
    "projections": {"projections": [{"vector": "v0", "layers": [1]}]},
    "everything": EVERYTHING,
    "through a tuned lens": {"lens": {"layers": [0, 1, 2], "lens": "tuned", "top": 2}},
    "through a Jacobian lens": {"lens": {"layers": [0, 1, 2], "lens": "jacobian", "top": 2}},
}


def steering(engine: Engine, library: MemoryLibrary, spec: dict[str, Any]) -> SteeringPlan:
    return PlanCache(library, engine.info, engine.capabilities).plan(parse_spec(spec))


def reading(
    engine: Engine,
    library: MemoryLibrary,
    spec: dict[str, Any],
    plan: SteeringPlan | None = None,
) -> ReadoutPlan:
    asked = ReadoutSpec.model_validate(spec)
    return compile_readouts(asked, library, engine.info, engine.capabilities, plan)


def fed_tokens(request: GenerationRequest, done: Completion, ended: int | None) -> tuple[int, ...]:
    """All that was fed: the last token never is; `ended` is one that finished the answer and is
    not among its tokens."""
    every = (*request.prompt, *done.tokens, *(() if ended is None else (ended,)))
    return every[:-1]


def expected(
    engine: Engine,
    library: MemoryLibrary,
    spec: dict[str, Any],
    tokens: Sequence[int],
    plan: SteeringPlan | None,
) -> list[Numbers]:
    """The numbers of every one of `tokens`, in the order of a `ReadoutPlan`.

    Assumes: `plan` steers them alike, whether they are prompt or generated.
    """
    points = [HookPoint(layer) for layer in range(engine.info.n_layers)]
    (captured,) = engine.capture(CaptureRequest([tokens], tuple(points), plans=[plan]))
    states = {point.layer: captured.states[point] for point in points}
    parts = [
        *_projections(spec, library, states),
        *_features(spec, library, states),
        *_lens(spec, library, states, engine),
        *(states[n].double().norm(dim=-1)[:, None] for n in spec.get("norms", ())),
    ]
    return list(torch.cat([part.double() for part in parts], dim=1).numpy())


def _projections(
    spec: dict[str, Any], library: MemoryLibrary, states: Mapping[int, torch.Tensor]
) -> list[torch.Tensor]:
    by_layer: dict[int, list[torch.Tensor]] = {}
    for item in spec.get("projections", ()):
        for layer in item["layers"]:
            direction = library.vector(item["vector"]).directions[layer].double()
            along = states[layer].double() @ direction / direction.norm()
            by_layer.setdefault(layer, []).append(along[:, None])
    return [torch.cat(found, dim=1) for found in by_layer.values()]


def _features(
    spec: dict[str, Any], library: MemoryLibrary, states: Mapping[int, torch.Tensor]
) -> list[torch.Tensor]:
    parts = []
    for item in spec.get("features", ()):
        sae = library.sae(item["sae"])
        activations = sae.encode(states[sae.layer])
        if "features" in item:
            parts.append(activations[:, item["features"]])
        else:
            best = activations.topk(item.get("top", 5), dim=-1)
            parts += [best.values, best.indices]
    return parts


def _lens(
    spec: dict[str, Any],
    library: MemoryLibrary,
    states: Mapping[int, torch.Tensor],
    engine: Engine,
) -> list[torch.Tensor]:
    parts = []
    item = spec.get("lens")
    for layer in item["layers"] if item else ():
        read = states[layer]
        if "lens" in item:
            read = library.lens(item["lens"]).translated(read, layer, "resid_post")
        chances = engine.unembed(read).double().softmax(-1)
        best = chances.topk(item.get("top", 5), dim=-1)
        entropy = -(chances * chances.clamp_min(1e-300).log()).sum(-1)
        parts += [best.values, best.indices, entropy[:, None]]
    return parts


def expected_kl(
    engine: Engine, tokens: Sequence[int], prompt_length: int, plan: SteeringPlan | None
) -> dict[int, float]:
    """KL(steered ‖ unsteered) in float64 of what each token behind the prompt was chosen from, by
    its position, from two offline passes.

    Assumes: `plan` steers them alike, whether they are prompt or generated.
    """
    captured = engine.capture(CaptureRequest([tokens, tokens], plans=[plan, None], logits="all"))
    logits = [one.logits.double().log_softmax(-1) for one in captured if one.logits is not None]
    apart = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    return {at: float(apart[at - 1]) for at in range(prompt_length, len(tokens))}


def assert_read(
    done: Completion, wanted: Sequence[Numbers], tokens: Sequence[int], first: int, end: int
) -> None:
    """Every position from `first` to before `end` was read once, in order, and rightly."""
    assert [one.position for one in done.readouts] == list(range(first, end))
    for one in done.readouts:
        assert one.token == tokens[one.position]
        difference = np.abs(np.array(one.numbers) - wanted[one.position])
        assert difference.max() < 1e-4, (one.position, difference.argmax(), difference.max())
