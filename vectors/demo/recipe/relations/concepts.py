"""Directions for the objects of a relation: linear relational concepts, and two simpler kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from steer_vectors.demo.recipe.relations.facts import QUESTIONS, Split
from torch import Tensor

from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.data.relations import Fact
from steer.fit.methods.lrc import (
    answered,
    ask,
    low_rank_inverse,
    object_states,
    spread,
    subject_jacobian,
)
from steer.model import HookPoint
from steer.spec import Site

SITE: Site = "resid_post"
JACOBIANS = 20

Concepts = dict[str, Tensor]
"""A unit direction for each object."""


@dataclass(frozen=True)
class Choice:
    """What is chosen on development splits."""

    layer: int
    object_layer: int | None = None
    rank: int | None = None
    strength: float | None = None


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
    """Linear relational concepts from the split's facts, as `steer.fit.methods.lrc` makes them."""
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
