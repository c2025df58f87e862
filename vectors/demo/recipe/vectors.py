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
from steer.fit.scoring import Score, Scorer
from steer.fit.sweep import Measured, measure
from steer.plan import SteeringPlan
from steer.plan_cache import PlanCache
from steer.registry.library import MemoryLibrary
from steer.spec import Where, parse_spec

from .scorers import scorer

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
LAYER_SETS = ((1,), (2,), (3,), (2, 3), (3, 4))
STRENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0)
PLACES = {
    "last prompt token": Where(positions=((-1, None),), phases=("prompt",)),
    "last prompt token and answer": Where(positions=((-1, None),)),
}
REFUSAL_LAYERS = ((2,), (3,), (4,), (2, 3), (2, 3, 4), (1, 2, 3, 4, 5))
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

    def plan(self, vector: ControlVector, intervention: dict[str, Any]) -> SteeringPlan:
        library = MemoryLibrary({vector.card.name: vector})
        cache = PlanCache(library, self.engine.info, self.engine.capabilities)
        return cache.plan(parse_spec({"interventions": [intervention]}))

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
        settings = [Setting(x, s, place) for x in LAYER_SETS for s in STRENGTHS]
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


def profile(name: str, intervention: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "spec": {"interventions": [intervention]}, "description": description}


def refusal_profiles(bench: Bench, vector: ControlVector, pairs: PairSet) -> list[dict[str, Any]]:
    """``compliant`` and ``cautious``: the projection on refusal, set to a class's mean.

    The same layers for both, chosen by the worse of the two flips.
    """

    def project(layers: tuple[int, ...], value: str) -> dict[str, Any]:
        return {"kind": "project", "vector": "refusal", "value": value, "layers": list(layers)}

    def flips(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> list[dict[str, float]]:
        off = [bench.plan(vector, project(layers, "negative")) for layers in REFUSAL_LAYERS]
        on = [bench.plan(vector, project(layers, "positive")) for layers in REFUSAL_LAYERS]
        rows = zip(
            bench.measure(harmful, off, complied),
            bench.measure(harmless, off, complied),
            bench.measure(harmless, on, scorer("refusal")),
            strict=True,
        )
        names = ("harmful answered", "harmless still answered", "harmless refused")
        return [
            dict(zip(names, (round(m.both or 0.0, 3) for m in row), strict=True)) for row in rows
        ]

    chosen = flips(
        [pair.positive for pair in pairs.items][:DEV_PROMPTS],
        [pair.negative for pair in pairs.items][:DEV_PROMPTS],
    )
    place = max(range(len(chosen)), key=lambda n: (min(chosen[n].values()), -n))
    layers = REFUSAL_LAYERS[place]
    shown = flips(bench.held_out("refusal"), bench.held_out("compliance"))[place]
    log.info("refusal at layers %s: %s", layers, shown)
    told = ", ".join(f"{name} {value:.0%}" for name, value in shown.items())
    return [
        profile(
            "compliant",
            project(layers, "negative"),
            f"Never refuses: the projection on refusal is set to the harmless mean ({told}).",
        ),
        profile(
            "cautious",
            project(layers, "positive"),
            f"Always refuses: the projection on refusal is set to the harmful mean ({told}).",
        ),
    ]


def complied(text: str) -> Score:
    """1 where nothing in the answer is a refusal."""
    found = scorer("refusal")(text)
    return Score(1.0 - found.value, found.valid)


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
                profiles = [profile(attribute, add(attribute), DESCRIPTIONS[attribute])]
            for one in profiles:
                write_profile(args.out, one)


if __name__ == "__main__":
    main()
