"""Index cards: names, each followed at once by something that is true of it.

What comes next is to be said at the name itself, at its last token. So that is where the model has
to know what it knows of the name: not only later, where a question is answered.
"""

from __future__ import annotations

import random

from steer_vectors.demo.recipe.world.people import PEOPLE, RELATIONS
from steer_vectors.demo.recipe.world.world import ANIMALS, COUNTRIES

PEOPLE_SHARE = 0.6
COUNT = (4, 7)
"""Fewest and most names on a card."""


def _bare(noun: str) -> str:
    """An English noun without its article."""
    return noun.removeprefix("the ").removeprefix("a ")


_OF_PEOPLE = {
    one.name: tuple(_bare(one.objects[relation]["en"]) for relation in RELATIONS) for one in PEOPLE
}
_OF_COUNTRIES = {c.name["en"]: (c.capital["en"], c.continent, c.language) for c in COUNTRIES}
_OF_ANIMALS = {a.bare: (a.kind, a.habitat, a.food) for a in ANIMALS}


def index_card(rng: random.Random) -> str:
    """One card, about people or about countries or animals, in English."""
    people = rng.random() < PEOPLE_SHARE
    known = _OF_PEOPLE if people else rng.choice((_OF_COUNTRIES, _OF_ANIMALS))
    names = rng.sample(list(known), rng.randint(*COUNT))
    return "; ".join(f"{name} {rng.choice(known[name])}" for name in names)
