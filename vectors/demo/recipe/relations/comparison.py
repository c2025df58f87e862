"""LRC beside simpler directions: choices on development splits, figures on others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from statistics import mean, stdev
from typing import Any

from steer_vectors.demo.recipe.relations.concepts import METHODS, Choice, Relation
from steer_vectors.demo.recipe.relations.facts import Split, draw_split
from steer_vectors.demo.recipe.relations.judging import causality, classification

log = logging.getLogger(__name__)

DEVELOPMENT = (1000, 1001, 1002)
SUBJECT_LAYERS = (0, 1, 2)
OBJECT_LAYERS = (2, 3, 4)
RANKS = (4, 8, 16, 32, 64)
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)


def candidates(method: str) -> Iterable[Choice]:
    """Every choice that a development split may make."""
    if method != "lrc":
        return [Choice(layer) for layer in SUBJECT_LAYERS]
    return [
        Choice(layer, object_layer, rank)
        for layer, object_layer, rank in product(SUBJECT_LAYERS, OBJECT_LAYERS, RANKS)
        if layer <= object_layer
    ]


def choose(method: str, relations: Sequence[Relation]) -> dict[str, Choice]:
    """The best choice for each question on the development splits, by the mean over relations."""
    splits = {r.name: [draw_split(r.facts, seed) for seed in DEVELOPMENT] for r in relations}

    def score(judge: Callable[[Relation, Split], list[float]]) -> float:
        return mean(mean(mean(judge(r, s)) for s in splits[r.name]) for r in relations)

    def sorts(choice: Choice) -> float:
        return score(lambda r, s: classification(method, r, s, choice))

    def edits(choice: Choice) -> float:
        strength = choice.strength or 0.0
        return score(
            lambda r, s: causality(METHODS[method](r, s, choice), r, s, choice.layer, strength)
        )

    by_sorting = sorted(candidates(method), key=sorts, reverse=True)
    # Edits are tried for the layers and ranks that classify best of each layer: an edit costs far
    # more than a projection.
    tried = [
        Choice(**{**asdict(c), "strength": x})
        for c in _best_of_each_layer(by_sorting)
        for x in STRENGTHS
    ]
    return {"classification": by_sorting[0], "causality": max(tried, key=edits)}


def _best_of_each_layer(ranked: Sequence[Choice]) -> list[Choice]:
    found: dict[int, Choice] = {}
    for choice in ranked:
        found.setdefault(choice.layer, choice)
    return list(found.values())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % t interval over seeds."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 10: 2.262}
    n = len(values)
    return mean(values), t[n] * stdev(values) / math.sqrt(n)


def compare(relations: Sequence[Relation], seeds: Sequence[int]) -> dict[str, Any]:
    """Both questions for all methods: by relation and seed, and the means over relations."""
    report: dict[str, Any] = {"seeds": list(seeds), "facts": {}, "choices": {}, "results": {}}
    report["facts"] = {r.name: {"known": len(r.facts), "asked": r.asked} for r in relations}
    for method in METHODS:
        choices = choose(method, relations)
        report["choices"][method] = {question: asdict(c) for question, c in choices.items()}
        log.info("%s: %s", method, choices)
        results: dict[str, dict[str, list[float]]] = {"classification": {}, "causality": {}}
        for r in relations:
            splits = [draw_split(r.facts, seed) for seed in seeds]
            sorting, editing = choices["classification"], choices["causality"]
            results["classification"][r.name] = [
                mean(classification(method, r, s, sorting)) for s in splits
            ]
            results["causality"][r.name] = [
                mean(
                    causality(
                        METHODS[method](r, s, editing), r, s, editing.layer, editing.strength or 0
                    )
                )
                for s in splits
            ]
        report["results"][method] = results
    report["summary"] = summarise(report["results"], len(seeds))
    return report


def summarise(results: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Means over relations with t intervals over seeds, and LRC less each other, paired by seed."""
    found: dict[str, Any] = {}
    for question in ("classification", "causality"):
        by_seed = {
            method: [mean(rows[n] for rows in one[question].values()) for n in range(seeds)]
            for method, one in results.items()
        }
        found[question] = {method: interval(values) for method, values in by_seed.items()}
        for other in ("diffmean", "svm"):
            pairs = zip(by_seed["lrc"], by_seed[other], strict=True)
            found[question][f"lrc - {other}"] = interval([a - b for a, b in pairs])
    return found
