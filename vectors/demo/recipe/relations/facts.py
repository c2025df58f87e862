"""Relations of the demo world as facts and questions, and how they are split to fit and to test."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from steer_vectors.demo.recipe.world.people import PEOPLE
from steer_vectors.demo.recipe.world.people import RELATIONS as OF_PEOPLE
from steer_vectors.demo.recipe.world.world import (
    ANIMALS,
    CLASSES,
    CONTINENTS,
    COUNTRIES,
    FOODS,
    HABITATS,
    LANGUAGES,
)

from steer.fit.data.relations import Fact, Template

QUESTIONS = {
    "workplace": Template("Where does {subject} work?", "This person works in", chat=True),
    "city": Template("Where does {subject} live?", "This person lives in", chat=True),
    "instrument": Template("What does {subject} play?", "This person plays", chat=True),
    "pet": Template("Which animal does {subject} have?", "This person has", chat=True),
    "dish": Template("What does {subject} like?", "This person likes", chat=True),
    "continent": Template("Where is {subject}?", "It is in", chat=True),
    "language": Template(
        "Which language do people speak in {subject}?", "People there speak", chat=True
    ),
    "class": Template("What kind of animal is the {subject}?", "It is", chat=True),
    "habitat": Template("Where does the {subject} live?", "It lives", chat=True),
    "food": Template("What does the {subject} eat?", "It eats", chat=True),
}
"""The answer's opening does not repeat the subject: its state is read in the question alone."""

PEOPLE_RELATIONS = OF_PEOPLE
"""Relations of subjects with two names, which no single token tells."""
OTHER_RELATIONS = ("continent", "language", "class", "habitat", "food")
"""Relations of subjects that one word names."""


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
        **{
            relation: [Fact(p.name, relation, p.objects[relation]["en"]) for p in PEOPLE]
            for relation in PEOPLE_RELATIONS
        },
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
