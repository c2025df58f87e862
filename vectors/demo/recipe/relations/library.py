"""Fit the shipped concepts: ``python -m steer_vectors.demo.recipe.relations.library``.

Linear relational concepts of three relations, one vector for each object, such as
``continent-Asia``. Layers, rank and the strength of ``swap`` are chosen for each relation on
development splits, and measured on other splits, where half of the subjects are fitted on and the
other half is tested. What is shipped is fitted on all subjects.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

from steer_vectors.demo.recipe.library.bench import DEMO, LICENCE, load_engine, write_vector
from steer_vectors.demo.recipe.relations.comparison import choose
from steer_vectors.demo.recipe.relations.concepts import JACOBIANS, METHODS, SITE, Choice, Relation
from steer_vectors.demo.recipe.relations.facts import QUESTIONS, draw_split, relation_facts
from steer_vectors.demo.recipe.relations.judging import causality, classification
from tqdm import tqdm

from steer.artefacts.control_vector import ControlVector
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.data.relations import RelationTable
from steer.fit.methods.lrc import fit_lrc

log = logging.getLogger(__name__)
SHIPPED = {"continent": "continent", "habitat": "lives", "food": "eats"}
"""Relations, and how the names of their concepts begin: ``food`` is a topic too."""
SEEDS = range(3)


def shipped(engine: TransformersEngine, name: str) -> Iterator[ControlVector]:
    """The concepts of one relation, with what was measured on their cards."""
    relation = Relation(engine, name, relation_facts()[name])
    choices = choose("lrc", [relation])
    editing = choices["causality"]
    shown = measured(relation, editing)
    log.info("%s: %s %s", name, editing, shown)
    found = fit_lrc(
        engine,
        RelationTable.of(relation_facts()[name]),
        name=SHIPPED[name],
        relation=name,
        template=QUESTIONS[name],
        subject_layer=editing.layer,
        object_layer=editing.object_layer,
        site=SITE,
        rank=editing.rank or 8,
        jacobians=JACOBIANS,
        rows=96,
        description=f"The concept of an object of the relation '{name}': for swaps and matching.",
        licence=LICENCE,
    )
    for vector in found.values():
        provenance = {
            **vector.card.provenance,
            "recipe": "steer_vectors.demo.recipe.relations.library",
            "held_out": shown,
        }
        changes = {"tags": ("demo", "relation", name), "provenance": provenance}
        yield replace(vector, card=vector.card.model_copy(update=changes))


def measured(relation: Relation, choice: Choice) -> dict[str, float]:
    """On subjects that were not fitted on: how many are sorted right, and how many answers change
    to the target when concepts are swapped at the subject's last token, in all layers."""
    splits = [draw_split(relation.facts, seed) for seed in SEEDS]
    strength = choice.strength or 0.0
    sorted_right = [mean(classification("lrc", relation, s, choice)) for s in splits]
    changed = [
        mean(causality(METHODS["lrc"](relation, s, choice), relation, s, choice.layer, strength))
        for s in splits
    ]
    return {
        "classification": round(mean(sorted_right), 3),
        "swapped": round(mean(changed), 3),
        "swap_strength": strength,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Fit the shipped relational concepts.")
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--out", type=Path, help="folder to write to (default: DEMO/relations)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with load_engine(args.demo / "model") as engine:
        for name in tqdm(SHIPPED, desc="relations"):
            for vector in shipped(engine, name):
                write_vector(args.out or args.demo / "relations", vector)


if __name__ == "__main__":
    main()
