"""One thing a user can ask, and what can be said in reply."""

from __future__ import annotations

from dataclasses import dataclass, field

from steer_vectors.demo.recipe.world.world import Tri


@dataclass(frozen=True)
class Question:
    """The wordings of a question per language and the clauses of its reply.

    ``first`` is said first; ``more`` may follow in any order.  ``by_sentiment``
    replaces ``more`` for opinions.  ``fact`` is the expected string per language, ``topic``
    what an opinion is about, ``again`` the first clause without its subject's name.
    """

    kind: str
    subject: str
    asks: dict[str, list[str]]
    first: tuple[Tri, ...]
    more: tuple[Tri, ...] = ()
    by_sentiment: dict[str, tuple[Tri, ...]] = field(default_factory=dict)
    harmful: bool = False
    fact: Tri | None = None
    again: Tri | None = None
    topic: str | None = None


def asks(en: list[str], fr: list[str], de: list[str]) -> dict[str, list[str]]:
    """Shorthand for the wordings of a question."""
    return {"en": en, "fr": fr, "de": de}
