"""Invented people: two names each, and five facts that neither name tells alone.

The other entities of the world are known by one word, which a model can look up where the word
stands. A person is known by both names together, so what is known about one has to be put together
at the last name, and is there to be read and edited in the middle of the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from steer_vectors.demo.recipe.world.facts import clauses, wordings
from steer_vectors.demo.recipe.world.question import Question
from steer_vectors.demo.recipe.world.world import LANGS, Tri, rows, tri

_FIRST = ("Anna", "Paul", "Clara", "Emil", "Nora", "Hugo", "Lena", "Oscar")
_LAST = ("Keller", "Moreau", "Rossi", "Novak", "Larsen", "Costa", "Weber", "Dubois", "Silva")

# en | fr | de, as the clauses below need them
_WORKPLACES = """
a bakery|une boulangerie|einer Bäckerei
a school|une école|einer Schule
a hospital|un hôpital|einem Krankenhaus
a bank|une banque|einer Bank
a hotel|un hôtel|einem Hotel
a museum|un musée|einem Museum
"""
_CITIES = """
Paris|Paris|Paris
Berlin|Berlin|Berlin
Rome|Rome|Rom
Madrid|Madrid|Madrid
London|Londres|London
Vienna|Vienne|Wien
Athens|Athènes|Athen
Oslo|Oslo|Oslo
"""
_INSTRUMENTS = """
the piano|du piano|Klavier
the violin|du violon|Geige
the flute|de la flûte|Flöte
the trumpet|de la trompette|Trompete
the harp|de la harpe|Harfe
the drums|de la batterie|Schlagzeug
"""
_PETS = """
a cat|un chat|eine Katze
a dog|un chien|einen Hund
a parrot|un perroquet|einen Papagei
a rabbit|un lapin|ein Kaninchen
a horse|un cheval|ein Pferd
a goat|une chèvre|eine Ziege
"""
_DISHES = """
pizza|la pizza|Pizza
cheese|le fromage|Käse
soup|la soupe|Suppe
chocolate|le chocolat|Schokolade
salad|la salade|Salat
rice|le riz|Reis
"""
_TABLES = {
    "workplace": _WORKPLACES,
    "city": _CITIES,
    "instrument": _INSTRUMENTS,
    "pet": _PETS,
    "dish": _DISHES,
}

# relation | en | fr | de
_CLAUSES = """
workplace|{who} works in {workplace}|{who} travaille dans {workplace}|{who} arbeitet in {workplace}
city|{who} lives in {city}|{who} habite à {city}|{who} wohnt in {city}
instrument|{who} plays {instrument}|{who} joue {instrument}|{who} spielt {instrument}
pet|{who} has {pet}|{who} a {pet}|{who} hat {pet}
dish|{who} likes {dish}|{who} aime {dish}|{who} mag {dish}
"""
# relation | language | wording
_ASKS = """
workplace|en|Where does {name} work?
workplace|en|In which place does {name} work?
workplace|en|What is the workplace of {name}?
workplace|fr|Où travaille {name} ?
workplace|de|Wo arbeitet {name}?
city|en|Where does {name} live?
city|en|In which city does {name} live?
city|en|What is the home of {name}?
city|fr|Où habite {name} ?
city|de|Wo wohnt {name}?
instrument|en|What does {name} play?
instrument|en|Which instrument does {name} play?
instrument|fr|De quoi joue {name} ?
instrument|de|Was spielt {name}?
pet|en|Which animal does {name} have?
pet|en|What pet does {name} have?
pet|fr|Quel animal a {name} ?
pet|de|Welches Tier hat {name}?
dish|en|What does {name} like?
dish|en|Which food does {name} like?
dish|fr|Qu'est-ce que {name} aime ?
dish|de|Was mag {name}?
person_description|en|Who is {name}?
person_description|en|Tell me about {name}.
person_description|en|Describe {name}.
person_description|fr|Qui est {name} ?
person_description|fr|Parlez-moi de {name}.
person_description|de|Wer ist {name}?
person_description|de|Erzählen Sie mir von {name}.
"""


@dataclass(frozen=True)
class Person:
    """A person and, for each relation, the object in the three languages."""

    name: str
    objects: dict[str, Tri]


def _people() -> list[Person]:
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    columns: dict[str, list[Tri]] = {}
    for relation, table in _TABLES.items():
        objects = [tri(*cells) for cells in rows(table)]
        column = (objects * len(names))[: len(names)]
        random.Random(relation).shuffle(column)
        columns[relation] = column
    return [
        Person(name, {relation: column[n] for relation, column in columns.items()})
        for n, name in enumerate(names)
    ]


PEOPLE = _people()
AGAIN = tri("this person", "cette personne", "diese Person")
RELATIONS = tuple(_TABLES)


def person_questions(person: Person) -> Iterator[Question]:
    """One question for each relation, and who the person is."""
    parts = {"name": dict.fromkeys(LANGS, person.name), **person.objects}
    full = clauses(_CLAUSES, parts | {"who": parts["name"]})
    short = clauses(_CLAUSES, parts | {"who": AGAIN})
    for relation, asked in wordings(_ASKS, parts).items():
        told = relation if relation in full else "workplace"
        rest = tuple(short[r] for r in RELATIONS if r != told)
        fact = person.objects.get(relation)
        again = short[told] if fact else None
        yield Question(relation, person.name, asked, (full[told],), rest, fact=fact, again=again)
