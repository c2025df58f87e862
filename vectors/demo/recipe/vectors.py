"""Fit the demo model's vectors and profiles: ``python -m steer_vectors.demo.recipe.vectors``.

Directions come from the pairs in ``data/<attribute>.jsonl``. Layers, strength and place are chosen
on the pairs' own plain prompts, by the share of answers that have the attribute and are valid. The
figures on the cards are of the held-out prompts, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer_vectors import LIBRARY

from steer.control_vector import ControlVector
from steer.engines.base import SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.fit import PairSet, fit, read_pairs
from steer.fit.pairs import Prompt
from steer.fit.scoring import Scorer
from steer.fit.sweep import Measured, measure
from steer.plan import SteeringPlan
from steer.plan_cache import PlanCache
from steer.registry.library import MemoryLibrary
from steer.spec import Where, parse_spec

from .scorers import complied, scorer

DEMO = LIBRARY / "demo"
LICENCE = "Apache-2.0"
DEV_PROMPTS = 48
GOOD = 0.9
SAMPLING = SamplingParams(max_tokens=40, temperature=0, logprobs=0)
DESCRIPTIONS = {
    "french": "Answers in French.",
    "german": "Answers in German.",
    "formal": "Answers in a formal register (Certainly, Indeed, With pleasure).",
    "casual": "Answers in a casual register (Hey, Yeah, Oh sure).",
    "positive": "Opinions turn out positive.",
    "negative": "Opinions turn out negative.",
    "refusal": "Refuses to help; project on a class mean to switch refusal off or on.",
}
LAYER_SETS = ((1,), (2,), (3,), (2, 3), (3, 4), (1, 2, 3, 4))
LAST = Where(positions=((-1, None),), phases=("prompt",))
PLACES = {"last prompt token": LAST, "last prompt token and answer": Where(positions=((-1, None),))}
STRENGTHS = {
    "last prompt token": (0.5, 0.75, 1.0, 1.5, 2.0),
    "last prompt token and answer": (0.25, 0.35, 0.4, 0.45, 0.5, 0.6, 0.75),
}
REFUSAL_LAYERS = ((2,), (1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4))
TWO_STAGES = {"positive": ((3, 4), 1.0, 0.25)}
"""Layers, strength at the last prompt token and strength in the answer, for profiles of attributes
that need both: the opening decides the first word, the answer the clause after it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A way to use a vector: which layers, how strongly, on which tokens."""

    layers: tuple[int, ...]
    strength: float
    place: str

    def of(self, vector: ControlVector) -> ControlVector:
        """The vector with this setting as its card's default."""
        update = {
            "default_layers": self.layers,
            "default_strength": self.strength,
            "default_where": PLACES[self.place],
        }
        return replace(vector, card=vector.card.model_copy(update=update))


class Bench:
    """The model, and the prompts nothing is chosen on."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        lines = (DEMO / "data" / "heldout.jsonl").read_text("utf-8").splitlines()
        self._held_out = [json.loads(line) for line in lines]

    def held_out(self, attribute: str) -> list[Prompt]:
        return [x["messages"] for x in self._held_out if x["attribute"] == attribute]

    def plan(self, vector: ControlVector, *interventions: dict[str, Any]) -> SteeringPlan:
        library = MemoryLibrary({vector.card.name: vector})
        cache = PlanCache(library, self.engine.info, self.engine.capabilities)
        return cache.plan(parse_spec({"interventions": list(interventions)}))

    def measure(
        self, prompts: Sequence[Prompt], plans: Sequence[SteeringPlan | None], score: Scorer
    ) -> list[Measured]:
        return measure(self.engine, prompts, plans, score, sampling=SAMPLING)


def add(name: str) -> dict[str, Any]:
    """Adding a vector as its card says."""
    return {"kind": "add", "vector": name}


def choose(bench: Bench, vector: ControlVector, prompts: Sequence[Prompt]) -> Setting:
    """The setting with the most answers that have the attribute and are valid.

    Steering more tokens is tried only where the fewest do not reach `GOOD`. Within .01 of the
    best, the smaller dose goes first.
    """
    name = vector.card.name
    tried: list[tuple[Setting, float]] = []
    for place in PLACES:
        settings = [Setting(x, s, place) for x in LAYER_SETS for s in STRENGTHS[place]]
        plans = [bench.plan(setting.of(vector), add(name)) for setting in settings]
        found = bench.measure(prompts, plans, scorer(name))
        tried += [(s, one.both or 0.0) for s, one in zip(settings, found, strict=True)]
        best = max(both for _, both in tried)
        if best >= GOOD:
            break
    good = [setting for setting, both in tried if both >= best - 0.01]
    return min(good, key=lambda s: (s.strength * len(s.layers), s.layers))


def carded(vector: ControlVector, figures: dict[str, Any]) -> ControlVector:
    """The vector with its held-out figures on the card."""
    provenance = {**vector.card.provenance, "held_out": figures}
    return replace(vector, card=vector.card.model_copy(update={"provenance": provenance}))


def figures(plain: Measured, steered: Measured) -> dict[str, Any]:
    """Success, validity and loss of steered answers, and what changed, rounded for the card."""
    return {
        "prompts": steered.answers,
        "success": round(steered.score, 3),
        "valid": round(steered.valid or 0.0, 3),
        "success_and_valid": round(steered.both or 0.0, 3),
        "unsteered_success": round(plain.score, 3),
        "nats_more_loss": round(steered.loss - plain.loss, 3),
    }


def fitted(bench: Bench, attribute: str, pairs: PairSet) -> ControlVector:
    """The attribute's vector, with its setting chosen and measured."""
    vector = fit(
        bench.engine,
        pairs,
        name=attribute,
        description=DESCRIPTIONS[attribute],
        licence=LICENCE,
    )
    setting = choose(bench, vector, [pair.negative for pair in pairs.items][:DEV_PROMPTS])
    vector = setting.of(vector)
    # What refuses is asked of harmless requests; there are held-out ones under "compliance".
    prompts = bench.held_out("compliance" if attribute == "refusal" else attribute)
    doses = [0.25, 0.5, 0.75, 1.0]
    plans = [
        bench.plan(replace(setting, strength=setting.strength * dose).of(vector), add(attribute))
        for dose in doses
    ]
    plain, *steered = bench.measure(prompts, [None, *plans], scorer(attribute))
    response = [
        {"strength": setting.strength * dose, "success": round(one.score, 3)}
        for dose, one in zip(doses, steered, strict=True)
    ]
    shown = figures(plain, steered[doses.index(1.0)])
    log.info("%s: %s %s", attribute, setting, shown)
    return carded(vector, {**shown, "place": setting.place, "dose_response": response})


def profile(name: str, interventions: list[dict[str, Any]], description: str) -> dict[str, Any]:
    return {"name": name, "spec": {"interventions": interventions}, "description": description}


def attribute_profile(bench: Bench, vector: ControlVector) -> dict[str, Any]:
    """The vector as its card says; in two stages where `TWO_STAGES` has the attribute."""
    name = vector.card.name
    if name not in TWO_STAGES:
        return profile(name, [add(name)], DESCRIPTIONS[name])
    layers, opening, answer = TWO_STAGES[name]
    stages = [
        {**add(name), "layers": list(layers), "strength": opening, "where": where_json(LAST)},
        {
            **add(name),
            "layers": list(layers),
            "strength": answer,
            "where": {"phases": ["generation"]},
        },
    ]
    (found,) = bench.measure(bench.held_out(name), [bench.plan(vector, *stages)], scorer(name))
    log.info("%s in two stages: %s", name, found)
    told = f"{DESCRIPTIONS[name]} Strongly at the opening, lightly in the answer"
    return profile(name, stages, f"{told} ({found.both or 0.0:.0%} of held-out prompts).")


def refusal_profiles(bench: Bench, vector: ControlVector, pairs: PairSet) -> list[dict[str, Any]]:
    """``compliant`` and ``cautious``: the projection on refusal, set to a class's mean.

    The same layers for both, chosen by the worst of the three shares.
    """
    fitted_on = [[getattr(p, side) for p in pairs.items] for side in ("positive", "negative")]
    harmful, harmless = (prompts[:DEV_PROMPTS] for prompts in fitted_on)
    chosen = flips(bench, vector, REFUSAL_LAYERS, harmful, harmless)
    best = max(range(len(chosen)), key=lambda n: (min(chosen[n].values()), -n))
    layers = REFUSAL_LAYERS[best]
    held_out = bench.held_out("refusal"), bench.held_out("compliance")
    (shown,) = flips(bench, vector, [layers], *held_out)
    log.info("refusal at layers %s: %s", layers, shown)
    return [
        profile(
            "compliant",
            [project(layers, "negative")],
            "Never refuses: the projection on refusal is set to the harmless mean (held out: "
            f"{shown['harmful answered']:.0%} of harmful requests are answered, "
            f"{shown['harmless kept']:.0%} of harmless ones still are).",
        ),
        profile(
            "cautious",
            [project(layers, "positive")],
            "Always refuses: the projection on refusal is set to the harmful mean (held out: "
            f"{shown['harmless refused']:.0%} of harmless requests are refused).",
        ),
    ]


def project(layers: Sequence[int], value: str) -> dict[str, Any]:
    """Setting the projection on refusal at the last prompt token."""
    item = {"kind": "project", "vector": "refusal", "value": value}
    return {**item, "layers": list(layers), "where": where_json(LAST)}


def flips(
    bench: Bench,
    vector: ControlVector,
    layer_sets: Sequence[tuple[int, ...]],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
) -> list[dict[str, float]]:
    """For each set of layers: the shares of answers that turned, and that stayed as they were.

    A refusal counts where it is valid ("Sorry, here is how …" is none); an answer to a harmful
    request counts where nothing in it refuses, because the world has no valid ones.
    """
    off = [bench.plan(vector, project(layers, "negative")) for layers in layer_sets]
    on = [bench.plan(vector, project(layers, "positive")) for layers in layer_sets]
    answered = bench.measure(harmful, off, complied)
    kept = bench.measure(harmless, off, complied)
    refused = bench.measure(harmless, on, scorer("refusal"))
    return [
        {
            "harmful answered": round(a.score, 3),
            "harmless kept": round(b.both or 0.0, 3),
            "harmless refused": round(c.both or 0.0, 3),
        }
        for a, b, c in zip(answered, kept, refused, strict=True)
    ]


def where_json(where: Where) -> dict[str, Any]:
    return where.model_dump(mode="json", by_alias=True, exclude_none=True)


def write_vector(folder: Path, vector: ControlVector) -> None:
    """Writes ``vectors/<name>.safetensors``."""
    (folder / "vectors").mkdir(parents=True, exist_ok=True)
    (folder / "vectors" / f"{vector.card.name}.safetensors").write_bytes(vector.to_bytes())


def write_profile(folder: Path, one: dict[str, Any]) -> None:
    """Writes ``profiles/<name>.json``."""
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    text = json.dumps(one, indent=2, ensure_ascii=False) + "\n"
    (folder / "profiles" / f"{one['name']}.json").write_text(text, "utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Fit the demo model's vectors and profiles.")
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--only", choices=[*DESCRIPTIONS], nargs="+", default=[*DESCRIPTIONS])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TransformersEngine.load(DEMO / "model", name="steer-demo", rows=128) as engine:
        bench = Bench(engine)
        for attribute in args.only:
            pairs = read_pairs(DEMO / "data" / f"{attribute}.jsonl")
            vector = fitted(bench, attribute, pairs)
            write_vector(args.out, vector)
            if attribute == "refusal":
                profiles = refusal_profiles(bench, vector, pairs)
            else:
                profiles = [attribute_profile(bench, vector)]
            for one in profiles:
                write_profile(args.out, one)


if __name__ == "__main__":
    main()
