"""Relation tables: facts as subject, relation and object, and the prompts that ask for them.

A file is JSON lines, `{"subject": "France", "relation": "capital", "object": "Paris"}`. A
`Template` puts a subject into words, after as many solved examples as it is told to give.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import FileFormatError, SteerError
from steer.fit.data.jsonl import LineReader, check_keys, sha256_of
from steer.prompts import Marked, Messages

_CODE = "invalid_relations"
_KEYS = ("subject", "relation", "object")


@dataclass(frozen=True)
class Fact:
    """That `object` is the `relation` of `subject`: Paris, capital, France."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class RelationTable:
    """Facts with the hash of the data they came from."""

    items: tuple[Fact, ...]
    sha256: str

    @staticmethod
    def of(facts: Sequence[Fact]) -> RelationTable:
        """A table from memory."""
        values = [{key: getattr(fact, key) for key in _KEYS} for fact in facts]
        return RelationTable(tuple(facts), sha256_of(values))

    def about(self, relation: str) -> tuple[Fact, ...]:
        """The facts of one relation, in the order of the file; raises `SteerError` if none are."""
        found = tuple(fact for fact in self.items if fact.relation == relation)
        if not found:
            known = ", ".join(sorted({fact.relation for fact in self.items}))
            raise SteerError(
                f"there are no facts of the relation {relation!r}: the table has {known}",
                code="unknown_relation",
            )
        return found

    def __len__(self) -> int:
        return len(self.items)


def read_relations(path: Path) -> RelationTable:
    """The facts of a JSON lines file. Raises `FileFormatError` that names the line."""
    found = _reader(path).read(_fact)
    return RelationTable(found.items, found.sha256)


def parse_relations(data: bytes, source: str) -> RelationTable:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    found = _reader(Path(source)).read_bytes(data, _fact)
    return RelationTable(found.items, found.sha256)


def _reader(path: Path) -> LineReader:
    return LineReader(path, "fact", '{"subject": …, "relation": …, "object": …}', _CODE)


@dataclass(frozen=True)
class Template:
    """A question about `{subject}`, and how its answer begins up to the object.

    `prompt` is a text, or the user's message in a chat (`chat`). `opening` is the beginning of the
    answer and may name `{subject}` too. `shots` other facts come first, solved.
    """

    prompt: str
    opening: str = ""
    chat: bool = False
    shots: int = 0

    def __post_init__(self) -> None:
        if "{subject}" not in self.prompt:
            raise SteerError(
                f"the template {self.prompt!r} does not say where the subject goes: "
                "write {subject} in it",
                code="invalid_template",
            )
        if self.shots < 0:
            raise SteerError(f"shots must be 0 or more; got {self.shots!r}", code="invalid_option")

    def ask(self, fact: Fact, others: Sequence[Fact] = (), seed: int = 0) -> Marked:
        """The prompt for `fact`, after `shots` solved examples drawn from `others` with `seed`."""
        pool = [one for one in others if one.subject != fact.subject]
        shown = random.Random(f"{seed}/{fact.subject}").sample(pool, min(self.shots, len(pool)))
        question, opening = self._filled(fact)
        solved = [(self._filled(one), one.object) for one in shown]
        if self.chat:
            turns: list[dict[str, str]] = []
            for (asked, begun), answer in solved:
                turns.append({"role": "user", "content": asked})
                turns.append({"role": "assistant", "content": joined(begun, answer)})
            prompt: str | Messages = [*turns, {"role": "user", "content": question}]
        else:
            lines = [joined(asked, joined(begun, answer)) for (asked, begun), answer in solved]
            prompt = "\n".join([*lines, question])
        return Marked(prompt, opening if self.chat or not opening else " " + opening, fact.subject)

    def _filled(self, fact: Fact) -> tuple[str, str]:
        return (
            self.prompt.replace("{subject}", fact.subject),
            self.opening.replace("{subject}", fact.subject),
        )


def joined(before: str, after: str) -> str:
    """Two pieces of a sentence with the space between them."""
    return f"{before} {after}" if before and after else before + after


def _fact(value: Any, at: str) -> Fact:
    fact = check_keys(value, _KEYS, at, "fact", _CODE)
    for key in _KEYS:
        if not isinstance(fact[key], str) or not fact[key]:
            raise FileFormatError(f"{at}: {key!r} must be a text; got {fact[key]!r}", code=_CODE)
    return Fact(**fact)
