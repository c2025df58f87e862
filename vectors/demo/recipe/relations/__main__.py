"""Do relational concepts beat simpler directions?

``python -m steer_vectors.demo.recipe.relations`` says so, or not.

Five relations of the demo world (with ``--subjects people``, five of its people);
for each, a direction per object from half of its subjects, by
linear relational concepts (2311.08968), difference in means (one object against the rest), and a
linear SVM. Two questions, both about the other half of the subjects:

- *classification*: is the object with the greatest projection of the subject's state the right one?
  (For the SVM: with the greatest decision value, intercept included.)
- *causality*: once ``swap`` has exchanged the subject's object for another at the subject's last
  token, does the model answer with the other one?

Layers, rank and edit strength are chosen for each method on development splits, by the mean over
all relations; the figures are of other splits. All splits are drawn from the same facts, so a
subject may be in a development split and in a test split: the choices, which are few, have seen it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from steer_vectors import LIBRARY
from steer_vectors.demo.recipe.relations.comparison import compare
from steer_vectors.demo.recipe.relations.concepts import Relation
from steer_vectors.demo.recipe.relations.facts import (
    OTHER_RELATIONS,
    PEOPLE_RELATIONS,
    relation_facts,
)

from steer.engines.transformers.engine import TransformersEngine

SUBJECTS = {"people": PEOPLE_RELATIONS, "countries and animals": OTHER_RELATIONS}


def show(report: Mapping[str, Any]) -> None:
    """The report as two Markdown tables."""
    relations = list(report["facts"])
    for question in ("classification", "causality"):
        print(f"\n| {question} | {' | '.join(relations)} | mean | 95 % |")
        print("|---" * (len(relations) + 3) + "|")
        for method, results in report["results"].items():
            cells = [f"{mean(results[question][name]):.3f}" for name in relations]
            middle, half = report["summary"][question][method]
            print(f"| {method} | {' | '.join(cells)} | {middle:.3f} | ±{half:.3f} |")
        for other in ("diffmean", "svm"):
            middle, half = report["summary"][question][f"lrc - {other}"]
            print(f"LRC − {other}: {middle:+.3f} ± {half:.3f}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Relational concepts against simpler directions.")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 9))
    parser.add_argument("--model", type=Path, default=LIBRARY / "demo" / "model")
    parser.add_argument("--subjects", choices=[*SUBJECTS], default="countries and animals")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = relation_facts()
    with TransformersEngine.load(args.model, name="steer-demo", rows=128) as engine:
        relations = [Relation(engine, name, known[name]) for name in SUBJECTS[args.subjects]]
        report = compare(relations, range(args.seeds))
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
