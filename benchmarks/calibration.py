"""Do calibrated strengths keep their word? The demo's vectors, on prompts they were not calibrated
on.

    python -m benchmarks.calibration [OUT.json]

For each vector and seed, a random half of the held-out prompts calibrates it and the other half
checks it: the KL that {"kl": x} really has, the share of the attribute that {"effect": x} really
reaches, and what happens at the end of the calibrated range. Then Concept Steerers' check
(2501.19066): how an attribute answers to λ, and how far the others move. Intervals are 95 %,
bootstrap over prompts.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from steer_vectors import LIBRARY
from steer_vectors.demo.recipe.scorers import scorer

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.cli.local import open_registry, running_engine
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import Answer, answers_under
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.calibrate import calibrate, mean_kl
from steer.fit.measure.evaluate import perplexity_ratio
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

SEEDS = (0, 1, 2)
VECTORS = ("french", "german", "formal", "casual", "negative")
FACTORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 2, 3, 4, 6, 8)
KLS = (0.05, 0.1, 0.2, 0.5, 1.0)
EFFECTS = (0.25, 0.5, 0.75, 0.9)
CONCEPTS = {
    "french": ("Answer in French.", "Answer in English."),
    "german": ("Answer in German.", "Answer in English."),
    "formal": ("Be formal.", "Be casual."),
    "casual": ("Be casual.", "Be formal."),
}
LAMBDAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0, 6.0)
OTHERS = ("french", "german", "formal", "casual", "positive", "negative", "refusal")
SAMPLING = SamplingParams(max_tokens=48, temperature=0, logprobs=0)


def held_out(attribute: str, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to calibrate on, and those to check on: a random half each."""
    lines = (LIBRARY / "demo" / "data" / "heldout.jsonl").read_text("utf-8").splitlines()
    found = [one for one in map(json.loads, lines) if one["attribute"] == attribute]
    prompts = [one["messages"] for one in found]
    random.Random(seed).shuffle(prompts)
    return prompts[:120], prompts[120:]


def check_vector(engine: Engine, name: str, seed: int) -> dict[str, Any]:
    data = (LIBRARY / "demo" / "vectors" / f"{name}.safetensors").read_bytes()
    plain = ControlVector.from_bytes(data, name=name)
    ours, theirs = held_out(name, seed)
    strengths = [factor * plain.card.default_strength for factor in FACTORS]
    found = calibrate(
        engine, plain, ours, scorer(name), scorer_name=f"demo:{name}", strengths=strengths
    )
    cache = plans_of(engine, MemoryLibrary({name: found.vector}))

    def plan(strength: Any) -> SteeringPlan:
        item = {"kind": "add", "vector": name, "strength": strength}
        return cache.plan(parse_spec({"interventions": [item]}))

    one = found.calibration
    draws = Resamples.draw(len(theirs))
    unsteered = _answers(engine, theirs, [None], name)[0]
    kls = {
        f"{x:g}": asdict(draws.mean(mean_kl(engine, unsteered, plan({"kl": x}))))
        for x in KLS
        if x <= one.kl[-1]
    }
    wanted = [*({"effect": x} for x in EFFECTS), "auto", one.safe_strength]
    rows = _answers(engine, theirs, [plan(x) for x in wanted], name)
    plain_scores = [answer.score.value for answer in unsteered]
    reached = [
        asdict(draws.difference([a.score.value for a in answers], plain_scores)) for answers in rows
    ]
    return {
        "default_strength": plain.card.default_strength,
        "safe_strength": one.safe_strength,
        "largest_measured": one.doses[-1].strength,
        "auto": found.auto,
        "kl_at_end": one.kl[-1],
        "perplexity_ratio_at_end": asdict(perplexity_ratio(draws, rows[-1], unsteered)),
        "valid_at_end": asdict(draws.mean([float(bool(a.score.valid)) for a in rows[-1]])),
        "linearity": one.linearity,
        "straightness": one.straightness,
        "monotonicity": one.monotonicity,
        "monotonicity_in_range": _spearman(one.strengths, [d.score or 0.0 for d in one.doses]),
        "kl_held_out": kls,
        "effect_held_out": dict(zip([f"{x:g}" for x in EFFECTS], reached, strict=False)),
        "auto_held_out": reached[-2],
        "end_held_out": reached[-1],
        "doses": [dose.model_dump(mode="json") for dose in one.doses],
    }


def check_concept(engine: Engine, plan: Callable[[Any], SteeringPlan], name: str) -> dict[str, Any]:
    """λ against the attribute's rate, and the largest move of any other attribute's."""
    text, contrast = CONCEPTS[name]
    prompts = held_out(name, 0)[1]
    item = {"kind": "concept", "sae": "resid-3", "text": text, "contrast": contrast}
    plans = [plan({**item, "strength": strength}) for strength in LAMBDAS]
    every = _answers(engine, prompts, [None, *plans], name)
    rates = [[_rate(answers, other) for answers in every] for other in OTHERS]
    own = rates[OTHERS.index(name)]
    moves = {
        other: max((x - row[0] for x in row), key=abs)
        for other, row in zip(OTHERS, rates, strict=True)
        if other != name
    }
    return {
        "text": text,
        "contrast": contrast,
        "lambdas": [0.0, *LAMBDAS],
        "rates": own,
        "valid": [_rate(answers, name, valid=True) for answers in every],
        "spearman": _spearman([0.0, *LAMBDAS], own),
        "largest_moves_of_others": moves,
    }


def _answers(
    engine: Engine, prompts: Sequence[Prompt], plans: Sequence[SteeringPlan | None], name: str
) -> list[tuple[Answer, ...]]:
    every = [prompts] * len(plans)
    return answers_under(engine, every, plans, scorer(name), sampling=SAMPLING)


def _rate(answers: Sequence[Answer], attribute: str, *, valid: bool = False) -> float:
    scores = [scorer(attribute)(answer.text) for answer in answers]
    return sum(float(bool(s.valid)) if valid else s.value for s in scores) / len(scores)


def _spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    ys = ys[: len(xs)]
    return None if len(set(ys)) < 2 else float(spearmanr(xs, ys).statistic)


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        open_registry(folder, "steer-demo") as registry,
        running_engine("steer-demo") as engine,
    ):
        cache = plans_of(engine, registry)
        found = {
            "vectors": {
                name: {seed: check_vector(engine, name, seed) for seed in SEEDS} for name in VECTORS
            },
            "concepts": {
                name: check_concept(
                    engine, lambda item: cache.plan(parse_spec({"interventions": [item]})), name
                )
                for name in CONCEPTS
            },
        }
    text = json.dumps(found, indent=2)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
