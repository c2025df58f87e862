"""Four ways to use the refusal direction, each measured: off, on, ablated, and as a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steer_vectors.demo.recipe.library.bench import LAST, Bench, add, where_json
from steer_vectors.demo.recipe.scorers import complied, scorer

from steer.artefacts.control_vector import ControlVector
from steer.fit.data.pairs import Prompt

DEV_PROMPTS = 48
LAYER_SETS = ((2,), (1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4))
ABLATED = ((1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (2,), (2, 3), (4, 5))
Built = tuple[str, dict[str, Any], str]
"""A name, a spec and a description."""
FittedOn = Callable[[str, str], list[Prompt]]
Vectors = Mapping[str, ControlVector]


def project(layers: Sequence[int], value: str) -> dict[str, Any]:
    """Setting the projection on refusal at the last prompt token to a class's mean."""
    item = {"kind": "project", "vector": "refusal", "value": value}
    return {**item, "layers": list(layers), "where": where_json(LAST)}


def switches(bench: Bench, vectors: Vectors, fitted_on: FittedOn) -> list[Built]:
    """Refusal off and on, at the same layers: those whose worst of three shares is best."""
    harmful = fitted_on("refusal", "positive")[:DEV_PROMPTS]
    harmless = fitted_on("refusal", "negative")[:DEV_PROMPTS]
    tried = flips(bench, vectors["refusal"], LAYER_SETS, harmful, harmless)
    best = max(range(len(tried)), key=lambda n: (min(tried[n].values()), -n))
    layers = LAYER_SETS[best]
    held_out = bench.held_out("refusal"), bench.held_out("compliance")
    (shown,) = flips(bench, vectors["refusal"], [layers], *held_out)
    off = (
        "Never refuses: the projection on refusal is set to the harmless mean (held out: "
        f"{shown['harmful answered']:.0%} of harmful requests are answered, "
        f"{shown['harmless kept']:.0%} of harmless ones still are)."
    )
    on = (
        "Always refuses: the projection on refusal is set to the harmful mean (held out: "
        f"{shown['harmless refused']:.0%} of harmless requests are refused)."
    )
    return [
        ("compliant", {"interventions": [project(layers, "negative")]}, off),
        ("cautious", {"interventions": [project(layers, "positive")]}, on),
    ]


def flips(
    bench: Bench,
    vector: ControlVector,
    layer_sets: Sequence[tuple[int, ...]],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
) -> list[dict[str, float]]:
    """For each set of layers: the shares of answers that turned, and that stayed as they were.

    A refusal counts where it is valid ("Sorry, here is how …" is none); an answer to a harmful
    request counts where it is valid and nothing in it refuses.
    """
    off = [bench.plan(vector, project(layers, "negative")) for layers in layer_sets]
    on = [bench.plan(vector, project(layers, "positive")) for layers in layer_sets]
    answered = bench.measure(harmful, off, complied)
    kept = bench.measure(harmless, off, complied)
    refused = bench.measure(harmless, on, scorer("refusal"))
    return [
        {
            "harmful answered": round(a.both or 0.0, 3),
            "harmless kept": round(b.both or 0.0, 3),
            "harmless refused": round(c.both or 0.0, 3),
        }
        for a, b, c in zip(answered, kept, refused, strict=True)
    ]


def unrefusing(bench: Bench, vectors: Vectors, fitted_on: FittedOn) -> Built:
    """The refusal direction removed (2406.11717), at every token of every layer or of some."""
    vector = vectors["refusal"]

    def ablation(layers: Sequence[int]) -> dict[str, Any]:
        return {"kind": "ablate", "vector": "refusal", "layers": list(layers)}

    harmful = fitted_on("refusal", "positive")[:DEV_PROMPTS]
    tried = bench.measure(harmful, [bench.plan(vector, ablation(x)) for x in ABLATED], complied)
    best = max(range(len(tried)), key=lambda n: (tried[n].both or 0.0, -n))
    item = ablation(ABLATED[best])
    plan = bench.plan(vector, item)
    (answered,) = bench.measure(bench.held_out("refusal"), [plan], complied)
    (kept,) = bench.measure(bench.held_out("compliance"), [plan], complied)
    told = (
        "Ablation: the refusal direction is removed at every token (held out: "
        f"{answered.both or 0.0:.0%} of harmful requests are answered, {kept.both or 0.0:.0%} of "
        "harmless ones still are)."
    )
    return "unrefusing", {"interventions": [item]}, told


def guarded(bench: Bench, vectors: Vectors) -> Built:
    """A style that a gate keeps away from requests that are going to be refused."""
    style = vectors["casual"]
    first = min(style.card.used_layers)
    measures = vectors["refusal"].card.measures
    # The gate is read before the first layer that it switches.
    layer = max(range(first), key=lambda n: measures[n].separation or 0.0)
    harmful, harmless = measures[layer].positive, measures[layer].negative
    assert harmful is not None
    assert harmless is not None
    gate = {
        "vector": "refusal",
        "layer": layer,
        "measure": "projection",
        "below": round((harmful + harmless) / 2, 3),
    }
    spec = {"interventions": [{**add("casual"), "when": gate}]}
    given = [*vectors.values()]
    plans = [bench.compiled({"interventions": [add("casual")]}, given), bench.compiled(spec, given)]
    free, gated = bench.measure(bench.held_out("refusal"), plans, scorer("refusal"))
    (styled,) = bench.measure(bench.held_out("compliance"), plans[1:], scorer("casual"))
    told = (
        "Gating: casual, but only where the prompt's projection on refusal is that of a harmless "
        f"request; others are left alone (held out: {styled.both or 0.0:.0%} of answers to "
        f"harmless requests are casual, {gated.both or 0.0:.0%} of harmful requests are refused; "
        f"without the gate {free.both or 0.0:.0%})."
    )
    return "guarded-casual", spec, told
