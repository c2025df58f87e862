"""Relational concepts against difference in means, as `relations` compares them."""

from __future__ import annotations

from collections.abc import Iterator

from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import Estimate, difference, share
from steer_vectors.demo.recipe.relations.comparison import compare
from steer_vectors.demo.recipe.relations.concepts import Choice, Relation, lrc
from steer_vectors.demo.recipe.relations.facts import (
    OTHER_RELATIONS,
    draw_split,
    relation_facts,
)
from steer_vectors.demo.recipe.relations.judging import causality, classification

BETTER = 0.05
CAUSAL = 0.75
SEEDS = 5
FEW = Choice(layer=1, object_layer=4, rank=32, strength=0.3)
"""For few prompts nothing is chosen: this is near what the comparison chooses."""


def relational(demo: Demo) -> Iterator[Check]:
    """How much better LRC classifies, and how often its edits turn the answer."""
    better, causal, unit = compared(demo) if demo.count >= 200 else one_split(demo)
    what = f"LRC less difference in means, classification (n: {unit})"
    yield Check("relations", what, better, BETTER)
    yield Check("relations", f"LRC, causal edits (n: {unit})", causal, CAUSAL)


def compared(demo: Demo) -> tuple[Estimate, Estimate, str]:
    """The comparison of five relations: means over them, t intervals over splits."""
    known = relation_facts()
    every = [Relation(demo.engine, name, known[name]) for name in OTHER_RELATIONS]
    found = compare(every, range(SEEDS))["summary"]
    better, half = found["classification"]["lrc - diffmean"]
    causal, width = found["causality"]["lrc"]
    return (
        Estimate(better, better - half, better + half, SEEDS),
        Estimate(causal, causal - width, causal + width, SEEDS),
        "splits",
    )


def one_split(demo: Demo) -> tuple[Estimate, Estimate, str]:
    """One split of the first relation, with a fixed choice."""
    name = OTHER_RELATIONS[0]
    relation = Relation(demo.engine, name, relation_facts()[name])
    split = draw_split(relation.facts, 0)
    hits = [classification(method, relation, split, FEW) for method in ("lrc", "diffmean")]
    concepts = lrc(relation, split, FEW)
    edits = causality(concepts, relation, split, FEW.layer, FEW.strength or 0.0)
    return difference(*hits), share([hit > 0 for hit in edits]), "subjects"
