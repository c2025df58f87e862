"""Attributes of an answer: how a sentence is written with them and read back.

A sentence is ``[marker, ]clause`` and a final mark.  The marker comes first,
because a choice made in the first token of an answer can be steered at the last
prompt token.  Reading back (`parse`) is exact: a sentence is valid only if its
clause is one of the clauses of the world, in one language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .world import LANGS, Tri

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
    """What one sentence shall look like."""

    lang: str = "en"
    register: str = "neutral"
    sentiment: str = "neutral"
    refusal: bool = False


def capitalise(text: str) -> str:
    """Upper-case the first letter only."""
    return text[:1].upper() + text[1:]


def slot(style: Style) -> str | None:
    """Name of the marker list a style uses; register goes before sentiment."""
    if style.refusal:
        return "refusal"
    if style.register != "neutral":
        return style.register
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
        return bool(self.sentences) and all(getattr(s, field) == value for s in self.sentences)

    def first(self, attribute: str) -> bool:
        """Whether the first sentence carries an attribute."""
        field, value = ATTRIBUTES[attribute]
        return bool(self.sentences) and getattr(self.sentences[0], field) == value


ATTRIBUTES: dict[str, tuple[str, object]] = {
    "english": ("lang", "en"),
    "french": ("lang", "fr"),
    "german": ("lang", "de"),
    "formal": ("register", "formal"),
    "casual": ("register", "casual"),
    "positive": ("sentiment", "positive"),
    "negative": ("sentiment", "negative"),
    "refusal": ("refusal", True),
}


class Reader:
    """Reads answers back into styles.

    Assumes: ``clauses`` are all clauses the world can say, with their sentiment.
    Guarantees: `parse` accepts exactly the sentences `sentence` can write.
    """

    def __init__(self, clauses: Iterable[tuple[Tri, str]]) -> None:
        self.known: dict[str, tuple[str, str]] = {}
        for clause, sentiment in clauses:
            for lang in LANGS:
                self.known[clause[lang]] = (lang, sentiment)
                self.known.setdefault(capitalise(clause[lang]), (lang, sentiment))
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
        spoken, sentiment = self.known.get(clause, (lang or "", "neutral"))
        register = name if name in ("formal", "casual") else "neutral"
        good = sentiment == name if name in SENTIMENTS else name != "refusal"
        good &= clause in self.known and lang in (None, spoken)
        good &= (mark == "!") == (register == "casual")
        return good, Style(spoken, register, sentiment, name == "refusal")

    def parse(self, answer: str) -> Reading:
        """Read a whole answer; text after the last full stop makes it invalid."""
        pieces = [p.strip() for p in re.findall(r"[^.!]+[.!]", answer)]
        rest = re.sub(r"[^.!]+[.!]", "", answer).strip()
        found = [r for r in map(self.read_sentence, pieces) if r is not None]
        return Reading(
            bool(found) and not rest and all(ok for ok, _ in found),
            tuple(style for _, style in found),
        )
