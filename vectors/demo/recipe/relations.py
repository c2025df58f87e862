"""Do relational concepts beat simpler directions?

``python -m steer_vectors.demo.recipe.relations`` says so, or not.

Five relations of the demo world; for each, a direction per object from half of its subjects, by
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
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from steer_vectors import LIBRARY
from torch import Tensor

from steer.control_vector import ControlVector
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.lrc import (
    Ask,
    answered,
    ask,
    low_rank_inverse,
    object_states,
    spread,
    subject_jacobian,
)
from steer.fit.relations import Fact, Template
from steer.model_info import HookPoint
from steer.registry.library import MemoryLibrary
from steer.spec import Site, parse_spec

from .world import ANIMALS, CLASSES, CONTINENTS, COUNTRIES, FOODS, HABITATS, LANGUAGES

log = logging.getLogger(__name__)

QUESTIONS = {
    "continent": Template("Where is {subject}?", "It is in", chat=True),
    "language": Template(
        "Which language do people speak in {subject}?", "People there speak", chat=True
    ),
    "class": Template("What kind of animal is the {subject}?", "It is", chat=True),
    "habitat": Template("Where does the {subject} live?", "It lives", chat=True),
    "food": Template("What does the {subject} eat?", "It eats", chat=True),
}
"""The answer's opening does not repeat the subject: its state is read in the question alone."""

SITE: Site = "resid_pre"
"""This model reads the subject in its first block, so that later states of the subject's token
change nothing: with the whole state of another subject in its place the answer follows in 90 to
100 % of the questions before the first block, in 0 to 85 % after it."""

DEVELOPMENT = (1000, 1001, 1002)
JACOBIANS = 20
SUBJECT_LAYERS = (0, 1, 2)
OBJECT_LAYERS = (2, 3, 4)
RANKS = (4, 8, 16, 32, 64)
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)

Concepts = dict[str, Tensor]
"""A unit direction for each object."""
Classify = Callable[[Tensor], str]


@dataclass(frozen=True)
class Choice:
    """What is chosen on development splits."""

    layer: int
    object_layer: int | None = None
    rank: int | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Split:
    """Indices of facts to fit on and to test on; every object of the test is in the fit."""

    fitted: tuple[int, ...]
    tested: tuple[int, ...]
    targets: tuple[str, ...]
    """For each tested fact, the object to put in its place."""


def relation_facts() -> dict[str, list[Fact]]:
    """The facts of each relation, in English."""
    return {
        "continent": [
            Fact(c.name["en"], "continent", CONTINENTS[c.continent]["en"]) for c in COUNTRIES
        ],
        "language": [
            Fact(c.name["en"], "language", LANGUAGES[c.language]["en"]) for c in COUNTRIES
        ],
        "class": [Fact(a.bare, "class", CLASSES[a.kind]["en"]) for a in ANIMALS],
        "habitat": [Fact(a.bare, "habitat", HABITATS[a.habitat]["en"]) for a in ANIMALS],
        "food": [Fact(a.bare, "food", FOODS[a.food]["en"]) for a in ANIMALS],
    }


def draw_split(facts: Sequence[Fact], seed: int) -> Split:
    """Half of each object's subjects to fit on; objects with one subject are left out."""
    draw = random.Random(seed)
    by_object: dict[str, list[int]] = {}
    for n, fact in enumerate(facts):
        by_object.setdefault(fact.object, []).append(n)
    fitted: list[int] = []
    tested: list[int] = []
    kept = sorted(answer for answer, group in by_object.items() if len(group) > 1)
    for answer in kept:
        group = by_object[answer][:]
        draw.shuffle(group)
        half = math.ceil(len(group) / 2)
        fitted += group[:half]
        tested += group[half:]
    targets = [draw.choice([a for a in kept if a != facts[n].object]) for n in tested]
    return Split(tuple(fitted), tuple(tested), tuple(targets))


class Relation:
    """One relation's facts that the model knows, and everything that is read of them."""

    def __init__(self, engine: TransformersEngine, name: str, facts: Sequence[Fact]) -> None:
        self.engine, self.name = engine, name
        self.asked = len(facts)
        self.asks = answered(engine, [ask(engine, QUESTIONS[name], f, (), 0) for f in facts])
        self.facts = [one.fact for one in self.asks]
        self._jacobians: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._outputs: dict[int, list[Tensor]] = {}

    @cached_property
    def states(self) -> dict[int, Tensor]:
        """The subjects' states `[facts, d]` on every layer."""
        points = tuple(HookPoint(layer, SITE) for layer in range(self.engine.info.n_layers))
        rows = [
            self.engine.capture(CaptureRequest([a.tokens], points, positions=(a.subject,)))[0]
            for a in self.asks
        ]
        return {p.layer: torch.cat([one.states[p] for one in rows]) for p in points}

    def jacobian(self, fact: int, layer: int, object_layer: int) -> tuple[Tensor, Tensor, Tensor]:
        key = (fact, layer, object_layer)
        if key not in self._jacobians:
            self._jacobians[key] = subject_jacobian(
                self.engine,
                self.asks[fact],
                HookPoint(layer, SITE),
                HookPoint(object_layer),
                rows=96,
            )
        return self._jacobians[key]

    def outputs(self, object_layer: int) -> list[Tensor]:
        """The objects' states o `[d]` of all facts."""
        if object_layer not in self._outputs:
            found = object_states(self.engine, self.asks, HookPoint(object_layer))
            self._outputs[object_layer] = [state for _, state in found]
        return self._outputs[object_layer]


def lrc(relation: Relation, split: Split, choice: Choice) -> Concepts:
    """Linear relational concepts from the facts of the split, as `steer.fit.lrc` makes them."""
    assert choice.object_layer is not None
    assert choice.rank is not None
    place = {id(relation.asks[n]): n for n in split.fitted}
    chosen = spread([relation.asks[n] for n in split.fitted], JACOBIANS)
    maps = [relation.jacobian(place[id(one)], choice.layer, choice.object_layer) for one in chosen]
    weight = torch.stack([jacobian for jacobian, _, _ in maps]).mean(0)
    bias = torch.stack([o - jacobian @ s for jacobian, s, o in maps]).mean(0)
    inverse = low_rank_inverse(weight, choice.rank)
    outputs = relation.outputs(choice.object_layer)
    sums: Concepts = {}
    for n in split.fitted:
        answer = relation.facts[n].object
        sums[answer] = sums.get(answer, torch.zeros_like(bias)) + inverse @ (outputs[n] - bias)
    return {answer: (row / row.norm()).float() for answer, row in sums.items()}


def difference_in_means(relation: Relation, split: Split, choice: Choice) -> Concepts:
    """For each object, the mean of its subjects less the mean of all others."""
    states = relation.states[choice.layer]
    found: Concepts = {}
    for answer in {relation.facts[n].object for n in split.fitted}:
        mine = [n for n in split.fitted if relation.facts[n].object == answer]
        rest = [n for n in split.fitted if relation.facts[n].object != answer]
        row = states[mine].mean(0) - states[rest].mean(0)
        found[answer] = row / row.norm()
    return found


def fitted_svm(relation: Relation, split: Split, choice: Choice) -> Any:
    """scikit-learn's linear SVM, one object against the rest, on states scaled by their size."""
    from sklearn.svm import LinearSVC  # noqa: PLC0415 (slow import)

    states = relation.states[choice.layer][list(split.fitted)]
    model = LinearSVC(C=1.0, max_iter=20_000, random_state=0)
    labels = [relation.facts[n].object for n in split.fitted]
    return model.fit((states / states.norm(dim=-1).mean()).numpy(), labels)


def svm(relation: Relation, split: Split, choice: Choice) -> Concepts:
    """The normals of the SVM's planes."""
    model = fitted_svm(relation, split, choice)
    rows = torch.from_numpy(model.coef_).float()
    return {str(a): row / row.norm() for a, row in zip(model.classes_, rows, strict=True)}


METHODS: Mapping[str, Callable[[Relation, Split, Choice], Concepts]] = {
    "lrc": lrc,
    "diffmean": difference_in_means,
    "svm": svm,
}


def classification(method: str, relation: Relation, split: Split, choice: Choice) -> list[float]:
    """For each tested fact, 1 where its object is found."""
    states = relation.states[choice.layer][list(split.tested)]
    if method == "svm":
        fitted = relation.states[choice.layer][list(split.fitted)]
        model = fitted_svm(relation, split, choice)
        said = [str(one) for one in model.predict((states / fitted.norm(dim=-1).mean()).numpy())]
    else:
        concepts = METHODS[method](relation, split, choice)
        names = sorted(concepts)
        best = (states @ torch.stack([concepts[a] for a in names]).T).argmax(-1)
        said = [names[n] for n in best.tolist()]
    return [
        float(one == relation.facts[n].object) for one, n in zip(said, split.tested, strict=True)
    ]


def causality(
    concepts: Concepts, relation: Relation, split: Split, layer: int, strength: float
) -> list[float]:
    """For each tested fact, 1 where the model answers with the target after the swap."""
    names = {answer: f"concept-{n}" for n, answer in enumerate(sorted(concepts))}
    vectors = {
        names[answer]: ControlVector.of({layer: row}, name=names[answer], site=SITE)
        for answer, row in concepts.items()
    }
    plans = plans_of(relation.engine, MemoryLibrary(vectors))
    requests = []
    for n, target in zip(split.tested, split.targets, strict=True):
        one: Ask = relation.asks[n]
        spec = {
            "interventions": [
                {
                    "kind": "swap",
                    "remove": names[one.fact.object],
                    "add": names[target],
                    "strength": strength,
                    "layers": "all",
                    "where": {"positions": [[one.subject, one.subject + 1]]},
                }
            ]
        }
        sampling = SamplingParams(max_tokens=8, temperature=0)
        plan = plans.plan(parse_spec(spec))
        requests.append(GenerationRequest(f"swap-{n}", one.prompt, sampling, plan))
    tokenizer = relation.engine.tokenizer
    said = [
        str(tokenizer.decode(list(done.tokens), skip_special_tokens=True)).strip()
        for done in relation.engine.complete(requests)
    ]
    return [float(_names(text, t)) for text, t in zip(said, split.targets, strict=True)]


def _names(text: str, answer: str) -> bool:
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalpha()


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
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = LIBRARY / "demo" / "model"
    with TransformersEngine.load(model, name="steer-demo", rows=128) as engine:
        relations = [Relation(engine, name, facts) for name, facts in relation_facts().items()]
        report = compare(relations, range(args.seeds))
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
