"""Questions about countries and animals, from tables of wordings and clauses.

A template names parts of its entity: ``{name}`` is the entity with its article,
``{of}`` and ``{inside}`` are the name after a preposition, ``{who}`` is the name
or, from the second sentence on, the pronoun of an animal.
"""

from __future__ import annotations

from collections.abc import Iterator

from steer_vectors.demo.recipe.world.question import Question
from steer_vectors.demo.recipe.world.world import (
    CLASSES,
    CONTINENTS,
    FOODS,
    HABITATS,
    LANGS,
    LANGUAGES,
    Animal,
    Country,
    Tri,
    french_de,
    german_accusative,
    german_of,
    rows,
)

# relation | en | fr | de
_COUNTRY_CLAUSES = """
capital|the capital {of} is {capital}|la capitale {of} est {capital}|die Hauptstadt {of} ist {capital}
continent|{name} is in {continent}|{name} se trouve en {continent}|{name} liegt in {continent}
language|people {inside} speak {language}|{inside}, on parle {language}|{inside} spricht man {language}
country|{capital} is the capital {of}|{capital} est la capitale {of}|{capital} ist die Hauptstadt {of}
"""  # noqa: E501
_ANIMAL_CLAUSES = """
class|{who} is {class}|{who} est {class}|{who} ist {class}
habitat|{who} lives {habitat}|{who} vit {habitat}|{who} lebt {habitat}
food|{who} eats {food}|{who} mange {food}|{who} frisst {food}
"""
# relation | language | wording
_COUNTRY_ASKS = """
capital|en|What is the capital {of}?
capital|en|Name the capital {of}.
capital|en|Which city is the capital {of}?
capital|fr|Quelle est la capitale {of} ?
capital|fr|Nommez la capitale {of}.
capital|de|Was ist die Hauptstadt {of}?
capital|de|Nennen Sie die Hauptstadt {of}.
continent|en|Where is {name}?
continent|en|On which continent is {name}?
continent|fr|Où se trouve {name} ?
continent|fr|Sur quel continent se trouve {name} ?
continent|de|Wo liegt {name}?
continent|de|Auf welchem Kontinent liegt {name}?
language|en|Which language do people speak {inside}?
language|en|What language is spoken {inside}?
language|fr|Quelle langue parle-t-on {inside} ?
language|fr|On parle quelle langue {inside} ?
language|de|Welche Sprache spricht man {inside}?
language|de|Was spricht man {inside}?
country|en|{capital} is the capital of which country?
country|en|Which country has the capital {capital}?
country|fr|{capital} est la capitale de quel pays ?
country|fr|Quel pays a pour capitale {capital} ?
country|de|Von welchem Land ist {capital} die Hauptstadt?
country|de|Welches Land hat die Hauptstadt {capital}?
country_description|en|Tell me about {name}.
country_description|en|Describe {name}.
country_description|en|What do you know about {name}?
country_description|fr|Parlez-moi {about}.
country_description|fr|Décrivez {name}.
country_description|de|Erzählen Sie mir {about}.
country_description|de|Beschreiben Sie {name}.
"""
_ANIMAL_ASKS = """
class|en|What kind of animal is {name}?
class|en|What is {name}?
class|fr|Quel genre d'animal est {name} ?
class|de|Was für ein Tier ist {name}?
habitat|en|Where does {name} live?
habitat|en|Where can I find {name}?
habitat|fr|Où vit {name} ?
habitat|de|Wo lebt {name}?
food|en|What does {name} eat?
food|en|Which food does {name} eat?
food|fr|Que mange {name} ?
food|de|Was frisst {name}?
animal_description|en|Tell me about {name}.
animal_description|en|Describe {name}.
animal_description|en|What do you know about {name}?
animal_description|fr|Parlez-moi {about}.
animal_description|fr|Décrivez {name}.
animal_description|de|Beschreiben Sie {about}.
animal_description|de|Was wissen Sie über {about}?
"""
Parts = dict[str, Tri]


def wordings(table: str, parts: Parts) -> dict[str, dict[str, list[str]]]:
    """relation -> language -> filled wordings, in the order of the table."""
    out: dict[str, dict[str, list[str]]] = {}
    for relation, lang, wording in rows(table):
        values = {part: texts[lang] for part, texts in parts.items()}
        per_lang = out.setdefault(relation, {each: [] for each in LANGS})
        per_lang[lang].append(wording.format(**values))
    return out


def clauses(table: str, parts: Parts) -> dict[str, Tri]:
    """relation -> filled clause."""
    return {
        relation: {
            lang: cell.format(**{part: texts[lang] for part, texts in parts.items()})
            for lang, cell in zip(LANGS, cells, strict=True)
        }
        for relation, *cells in rows(table)
    }


def without_article(name: str) -> str:
    """A French or German country name without its article."""
    for article in ("le ", "la ", "l'", "die "):
        name = name.removeprefix(article)
    return name


def country_parts(c: Country) -> Parts:
    """What the templates can say about a country."""
    german = "von " + german_of(c.name["de"]).removeprefix("von ")
    return {
        "name": c.name,
        "of": c.of,
        "inside": c.inside,
        "about": {"en": c.name["en"], "fr": french_de(c.name["fr"]), "de": german},
        "capital": c.capital,
        "continent": CONTINENTS[c.continent],
        "language": LANGUAGES[c.language],
    }


def country_questions(c: Country) -> Iterator[Question]:
    """Capital, continent, language, the inverse of capital, and a description."""
    parts = country_parts(c)
    said = clauses(_COUNTRY_CLAUSES, parts)
    more = {
        "capital": ("continent", "language"),
        "continent": ("capital", "language"),
        "language": ("capital", "continent"),
        "country": ("continent", "language"),
    }
    fact = parts | {"country": {lang: without_article(c.name[lang]) for lang in LANGS}}
    for relation, asked in wordings(_COUNTRY_ASKS, parts).items():
        if relation in said:
            rest = tuple(said[r] for r in more[relation])
            first = said[relation]
            yield Question(relation, c.name["en"], asked, (first,), rest, fact=fact[relation])
        else:
            rest = (said["capital"], said["language"])
            yield Question(relation, c.name["en"], asked, (said["continent"],), rest)


def animal_parts(a: Animal) -> Parts:
    """What the templates can say about an animal."""
    accusative = german_accusative(a.name["de"])
    return {
        "name": a.name,
        "about": {"en": a.name["en"], "fr": french_de(a.name["fr"]), "de": accusative},
        "class": CLASSES[a.kind],
        "habitat": HABITATS[a.habitat],
        "food": FOODS[a.food],
    }


def animal_questions(a: Animal) -> Iterator[Question]:
    """Class, habitat, food, and a description."""
    parts = animal_parts(a)
    full = clauses(_ANIMAL_CLAUSES, parts | {"who": a.name})
    short = clauses(_ANIMAL_CLAUSES, parts | {"who": a.pronoun})
    for relation, asked in wordings(_ANIMAL_ASKS, parts).items():
        told = relation if relation in full else "class"
        rest = tuple(short[r] for r in full if r != told)
        fact = parts[relation] if relation in full else None
        yield Question(relation, a.bare, asked, (full[told],), rest, fact=fact)
