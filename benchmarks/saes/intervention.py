"""Do labels say what features do? Own labels against those of other features (2410.13928).

The aim: AUROC ≥ .9, and an interval of directions of chance that contains 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.saes.setting import Setting, counting
from steer.fit.features.effect import EffectGround, EffectOptions, written_tokens
from steer.fit.features.intervention import (
    InterventionResult,
    intervention_scores,
    intervention_steps,
)
from steer.fit.measure.bootstrap import Interval, Resamples
from steer.fit.requests.features.effect import asked_questions
from steer.prompts import token_texts
from steer.registry.features.scores import InterventionScore

AIM = 0.9
POINTED = 4
"""Tokens that a label of what a decoder row points to names."""


def measure(
    setting: Setting,
    features: Sequence[int],
    options: EffectOptions,
    questions: int,
    *,
    pointed: bool = True,
) -> dict[str, Any]:
    """The scores of the labels of `features` (what they fire on), and, `pointed`, of labels that
    name the tokens that their decoder rows point to."""
    engine, sae = setting.engine, setting.sae
    asked = asked_questions(engine, None, options.seed, questions)
    ground = EffectGround.of(engine, sae, asked, options)
    kinds = {"fires on": {n: setting.labels[n].text for n in features}}
    if pointed:
        kinds["points to"] = _pointed(setting, features)
    found = {}
    for kind, labels in kinds.items():
        steps = intervention_steps(len(labels), 2 * options.nulls, len(asked))
        with counting(f"labels: {kind}", steps, "step") as bar:
            scored = intervention_scores(ground, labels, asked, progress=bar.update)
        found[kind] = {**summary(scored, options.seed), "labels": _rows(scored, labels)}
    return {
        "questions": len(asked),
        "tokens": options.max_tokens,
        "kl": options.kl,
        "nulls": 2 * options.nulls,
        "found": found,
    }


def summary(scored: InterventionResult, seed: int = 0) -> dict[str, Any]:
    """AUROC; the mean gain of own labels, of others' and of directions of chance, with intervals
    over features; and in how many features the interval of chance contains 0."""
    scores = list(scored.scores.values())
    draws = Resamples.draw(len(scores), seed=seed)
    own, others, chance = (_column(scores, part) for part in ("gain", "shuffled", "null"))
    known = [one for one in scores if one.null_low is not None and one.null_high is not None]
    return {
        "features": len(scores),
        "auroc": scored.auroc,
        "met": scored.auroc is not None and scored.auroc >= AIM,
        "own": draws.mean(own),
        "others": draws.mean(others),
        "chance": draws.mean(chance),
        "own − others": draws.difference(own, others),
        "own − chance": draws.difference(own, chance),
        "chance contains 0": sum((one.null_low or 0) <= 0 <= (one.null_high or 0) for one in known),
        "p ≤ .05": sum(one.p is not None and one.p <= 0.05 for one in scores),
    }


def _column(scores: Sequence[InterventionScore], part: str) -> list[float]:
    found = [getattr(one, part) for one in scores]
    return [math.nan if one is None else float(one) for one in found]


def _pointed(setting: Setting, features: Sequence[int]) -> dict[int, str]:
    tokenizer = setting.engine.tokenizer
    found = {}
    for feature, tokens in zip(
        features, written_tokens(setting.engine, setting.sae, features, POINTED), strict=True
    ):
        if tokens is None:
            raise ValueError("the engine cannot say which tokens the decoder rows point to")
        found[feature] = "words such as " + ", ".join(
            one.strip() for one in token_texts(tokenizer, list(tokens))
        )
    return found


def _rows(scored: InterventionResult, labels: Mapping[int, str]) -> list[dict[str, Any]]:
    return [
        {"feature": feature, "label": labels[feature], **one.model_dump()}
        for feature, one in scored.scores.items()
    ]


def lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    return [
        (
            kind,
            str(one["features"]),
            "" if one["auroc"] is None else f"{one['auroc']:.2f}",
            *(_signed(one[part]) for part in ("own", "others", "chance")),
            f"{one['chance contains 0']} of {one['features']}",
            f"{one['p ≤ .05']} of {one['features']}",
        )
        for kind, one in found["found"].items()
    ]


HEADINGS = ("labels", "n", "AUROC", "own", "others'", "chance", "chance has 0", "p ≤ .05")


def _signed(one: Interval) -> str:
    return f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
