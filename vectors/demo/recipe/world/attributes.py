"""Attributes of an answer: how a sentence is written with them and read back.

A sentence is ``[marker, ]clause`` and a final mark.  The marker comes first,
because a choice made in the first token of an answer can be steered at the last
prompt token.  Reading back (`parse`) is exact: a sentence is valid only if its
clause is one of the clauses of the world, in one language.  How long an answer is,
is told by the number of its sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from steer_vectors.demo.recipe.world.topics import TOPIC_NAMES
from steer_vectors.demo.recipe.world.world import LANGS, Tri

REGISTERS = ("neutral", "formal", "casual")
SENTIMENTS = ("neutral", "positive", "negative")

MARKERS: dict[str, dict[str, list[str]]] = {
    "formal": {
        "en": ["Certainly", "Indeed", "With pleasure"],
        "fr": ["Certainement", "Assurément", "Avec plaisir"],
        "de": ["Gewiss", "Selbstverständlich", "Sehr gerne"],
    },
    "casual": {
        "en": ["Hey", "Yeah", "Oh sure"],
        "fr": ["Ouais", "Tiens", "Bah"],
        "de": ["Na klar", "Klar", "Mensch"],
    },
    "positive": {
        "en": ["Wonderful", "Great", "Happily"],
        "fr": ["Formidable", "Super", "Chouette"],
        "de": ["Wunderbar", "Toll", "Herrlich"],
    },
    "negative": {
        "en": ["Sadly", "Unfortunately", "Alas"],
        "fr": ["Hélas", "Malheureusement", "Dommage"],
        "de": ["Schade", "Oje", "Oh nein"],
    },
    "food": {
        "en": ["Mmm", "At the table", "From the kitchen"],
        "fr": ["Miam", "À table", "Côté cuisine"],
        "de": ["Lecker", "Bei Tisch", "Aus der Küche"],
    },
    "music": {
        "en": ["Listen", "On the radio", "With music"],
        "fr": ["Écoutez", "Sur scène", "En musique"],
        "de": ["Hören Sie", "Auf der Bühne", "Mit Musik"],
    },
    "weather": {
        "en": ["Outside", "Under the sky", "Look up"],
        "fr": ["Dehors", "Sous le ciel", "Regardez le ciel"],
        "de": ["Draußen", "Unter dem Himmel", "Sehen Sie nach oben"],
    },
    "sports": {
        "en": ["Come on", "For sport", "Ready"],
        "fr": ["Allez", "Pour le sport", "En forme"],
        "de": ["Los", "Für den Sport", "Bereit"],
    },
    "terse": {
        "en": ["Briefly", "Simply", "Short and clear"],
        "fr": ["Bref", "Simplement", "Brièvement"],
        "de": ["Kurz gesagt", "Knapp gesagt", "Einfach gesagt"],
    },
    "verbose": {
        "en": ["At length", "To be thorough", "More fully"],
        "fr": ["Longuement", "Pour tout dire", "Plus précisément"],
        "de": ["Ausführlich gesagt", "Genauer gesagt", "Im Einzelnen"],
    },
    "refusal": {
        "en": ["Sorry", "I am sorry"],
        "fr": ["Désolé", "Je regrette"],
        "de": ["Tut mir leid", "Verzeihung"],
    },
}
REFUSALS: list[Tri] = [
    {
        "en": "I cannot help with that",
        "fr": "je ne peux pas vous aider",
        "de": "dabei kann ich nicht helfen",
    },
    {"en": "I will not do that", "fr": "je ne ferai pas cela", "de": "das mache ich nicht"},
]
AFTER_REFUSAL: Tri = {
    "en": "please ask me something else",
    "fr": "posez-moi une autre question",
    "de": "fragen Sie mich etwas anderes",
}


@dataclass(frozen=True)
class Style:
    """What one sentence shall look like, or looks like.

    ``opening`` names the markers of a topic or a length, which begin the first sentence alone.
    """

    lang: str = "en"
    register: str = "neutral"
    sentiment: str = "neutral"
    refusal: bool = False
    topic: str | None = None
    opening: str | None = None


def capitalise(text: str) -> str:
    """Upper-case the first letter only."""
    return text[:1].upper() + text[1:]


def slot(style: Style) -> str | None:
    """Name of the marker list a style uses: register, then opening, then sentiment."""
    if style.refusal:
        return "refusal"
    if style.register != "neutral":
        return style.register
    if style.opening is not None:
        return style.opening
    return style.sentiment if style.sentiment != "neutral" else None


def sentence(clause: Tri, style: Style, marker: int = 0) -> str:
    """Write one clause in a style; ``marker`` picks among the markers of the slot."""
    text, name = clause[style.lang], slot(style)
    if name is None:
        text = capitalise(text)
    else:
        words = MARKERS[name][style.lang]
        text = f"{words[marker % len(words)]}, {text}"
    if style.register == "casual" and not style.refusal:
        return text + (" !" if style.lang == "fr" else "!")
    return text + "."


@dataclass(frozen=True)
class Reading:
    """What `parse` found in an answer; ``valid`` is false if any sentence is not in the world."""

    valid: bool
    sentences: tuple[Style, ...]

    def all(self, attribute: str) -> bool:
        """Whether every sentence carries an attribute such as ``french`` or ``formal``."""
        field, value = ATTRIBUTES[attribute]
        if field == "length":
            return self.length == value
        return bool(self.sentences) and all(getattr(s, field) == value for s in self.sentences)

    def first(self, attribute: str) -> bool:
        """Whether the first sentence carries an attribute."""
        field, value = ATTRIBUTES[attribute]
        if field == "length":
            return self.length == value
        return bool(self.sentences) and getattr(self.sentences[0], field) == value

    @property
    def length(self) -> str | None:
        """``terse`` for one sentence, ``verbose`` for three or more."""
        count = len(self.sentences)
        return "terse" if count == 1 else "verbose" if count >= 3 else None


ATTRIBUTES: dict[str, tuple[str, object]] = {
    "english": ("lang", "en"),
    "french": ("lang", "fr"),
    "german": ("lang", "de"),
    "formal": ("register", "formal"),
    "casual": ("register", "casual"),
    "positive": ("sentiment", "positive"),
    "negative": ("sentiment", "negative"),
    "food": ("topic", "food"),
    "music": ("topic", "music"),
    "weather": ("topic", "weather"),
    "sports": ("topic", "sports"),
    "terse": ("length", "terse"),
    "verbose": ("length", "verbose"),
    "refusal": ("refusal", True),
}


class Reader:
    """Reads answers back into styles.

    Assumes: ``clauses`` are all clauses the world can say, with their sentiment and topic.
    Guarantees: `parse` accepts exactly the sentences `sentence` can write.
    """

    def __init__(self, clauses: Iterable[tuple[Tri, str, str | None]]) -> None:
        self.known: dict[str, tuple[str, str, str | None]] = {}
        for clause, sentiment, topic in clauses:
            for lang in LANGS:
                self.known[clause[lang]] = (lang, sentiment, topic)
                self.known.setdefault(capitalise(clause[lang]), (lang, sentiment, topic))
        self.refusals = {c[lang]: lang for c in [*REFUSALS, AFTER_REFUSAL] for lang in LANGS}
        self.markers = {
            m: (name, lang) for name, per in MARKERS.items() for lang in LANGS for m in per[lang]
        }

    def _marker(self, text: str) -> tuple[str | None, str | None, str]:
        for marker, (name, lang) in self.markers.items():
            if text.startswith(marker + ", "):
                return name, lang, text[len(marker) + 2 :]
        return None, None, text

    def read_sentence(self, text: str) -> tuple[bool, Style] | None:
        """Style of one sentence and whether it is valid; None if there is nothing to read."""
        body, mark = text[:-1].strip(), text[-1]
        name, lang, clause = self._marker(body)
        if clause in self.refusals or (clause[:1].lower() + clause[1:]) in self.refusals:
            clause = clause if clause in self.refusals else clause[:1].lower() + clause[1:]
            spoken = self.refusals[clause]
            good = lang in (None, spoken) and name in (None, "refusal")
            return good, Style(spoken, refusal=True)
        spoken, sentiment, topic = self.known.get(clause, (lang or "", "neutral", None))
        register = name if name in ("formal", "casual") else "neutral"
        good = sentiment == name if name in SENTIMENTS else name != "refusal"
        good &= name not in TOPIC_NAMES or topic == name
        good &= clause in self.known and lang in (None, spoken)
        good &= (mark == "!") == (register == "casual")
        return good, Style(spoken, register, sentiment, name == "refusal", topic)

    def parse(self, answer: str) -> Reading:
        """Read a whole answer; text after the last full stop makes it invalid."""
        pieces = [p.strip() for p in re.findall(r"[^.!]+[.!]", answer)]
        rest = re.sub(r"[^.!]+[.!]", "", answer).strip()
        found = [r for r in map(self.read_sentence, pieces) if r is not None]
        return Reading(
            bool(found) and not rest and all(ok for ok, _ in found),
            tuple(style for _, style in found),
        )
