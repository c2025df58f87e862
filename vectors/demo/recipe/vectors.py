"""Fit the demo model's vectors: ``python -m steer_vectors.demo.recipe.vectors``.

Directions come from the pairs in ``data/<attribute>.jsonl``. Layers, strength and place are chosen
on the plain prompts of the first `CHOOSING` pairs, by the share of answers that have the attribute
and are valid; the calibration is measured on those of the other pairs. The figures on the cards are
of the held-out prompts, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.library.bench import (
    DEMO,
    LICENCE,
    SAMPLING,
    Bench,
    add,
    load_engine,
    write_vector,
)
from steer_vectors.demo.recipe.library.choosing import Setting, choose
from steer_vectors.demo.recipe.scorers import scorer
from tqdm import tqdm

from steer.artefacts.control_vector import ControlVector
from steer.fit import PairSet, fit, read_pairs
from steer.fit.measure.answers import Measured
from steer.fit.measure.calibrate import calibrate

CHOOSING = 80
DESCRIPTIONS = {
    "french": "Answers in French.",
    "german": "Answers in German.",
    "formal": "Answers in a formal register (Certainly, Indeed, With pleasure).",
    "casual": "Answers in a casual register (Hey, Yeah, Oh sure).",
    "positive": "Opinions turn out positive.",
    "negative": "Opinions turn out negative.",
    "food": "Talks about food, where the subject is open.",
    "music": "Talks about music, where the subject is open.",
    "weather": "Talks about the weather, where the subject is open.",
    "sports": "Talks about sports, where the subject is open.",
    "terse": "Answers in one sentence.",
    "verbose": "Answers in three sentences.",
    "refusal": "Refuses to help; project on a class mean to switch refusal off or on.",
}
KINDS = {
    "language": ("french", "german"),
    "register": ("formal", "casual"),
    "sentiment": ("positive", "negative"),
    "topic": ("food", "music", "weather", "sports"),
    "verbosity": ("terse", "verbose"),
    "refusal": ("refusal",),
}
"""Attributes and their values; the attribute is a tag on the value's card."""
TAGS = {value: kind for kind, values in KINDS.items() for value in values}
DOSES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the default strength that the card's dose-response is measured at."""
log = logging.getLogger(__name__)


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
    """The attribute's vector with its setting chosen, calibrated, and measured."""
    vector = fit(
        bench.engine,
        pairs,
        name=attribute,
        description=DESCRIPTIONS[attribute],
        licence=LICENCE,
    )
    vector = replace(
        vector, card=vector.card.model_copy(update={"tags": ("demo", TAGS[attribute])})
    )
    plain = [pair.negative for pair in pairs.items]
    setting = choose(bench, vector, plain[:CHOOSING])
    calibrated = calibrate(
        bench.engine,
        setting.of(vector),
        plain[CHOOSING:],
        scorer(attribute),
        scorer_name=f"demo:{attribute}",
        max_tokens=SAMPLING.max_tokens,
    )
    shown = held_out(bench, vector, setting)
    log.info("%s: %s %s", attribute, setting, shown)
    return carded(calibrated.vector, shown)


def held_out(bench: Bench, vector: ControlVector, setting: Setting) -> dict[str, Any]:
    """The figures of the held-out prompts, at the setting and at smaller strengths."""
    name = vector.card.name
    prompts = bench.held_out(asked_of(name))
    plans = [
        bench.plan(replace(setting, strength=setting.strength * dose).of(vector), add(name))
        for dose in DOSES
    ]
    plain, *steered = bench.measure(prompts, [None, *plans], scorer(name))
    response = [
        {"strength": setting.strength * dose, "success": round(one.score, 3)}
        for dose, one in zip(DOSES, steered, strict=True)
    ]
    shown = figures(plain, steered[-1])
    return {**shown, "place": setting.place, "dose_response": response}


def carded(vector: ControlVector, shown: dict[str, Any]) -> ControlVector:
    """The vector with its held-out figures on the card."""
    provenance = {
        **vector.card.provenance,
        "recipe": "steer_vectors.demo.recipe.vectors",
        "held_out": shown,
    }
    return replace(vector, card=vector.card.model_copy(update={"provenance": provenance}))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Fit the demo model's vectors.")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder with model/ and data/")
    parser.add_argument("--out", type=Path, help="folder to write to (default: DEMO/vectors)")
    parser.add_argument("--only", choices=[*DESCRIPTIONS], nargs="+", default=[*DESCRIPTIONS])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with load_engine(args.demo / "model") as engine:
        bench = Bench(engine, args.demo)
        for attribute in tqdm(args.only, desc="vectors"):
            pairs = read_pairs(args.demo / "data" / f"{attribute}.jsonl")
            write_vector(args.out or args.demo / "vectors", fitted(bench, attribute, pairs))


if __name__ == "__main__":
    main()
