"""Prompts with an answer to prefer and one to avoid.

A file is JSON lines, `{"prompt": PROMPT, "chosen": TEXT, "rejected": TEXT}`. An answer that is
missing is the model's own: `steer.fit.data.answering` asks for it, the one to prefer with an
instruction and the one to avoid without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from steer.errors import FileFormatError, SteerError
from steer.fit.data.exercises import Exercise, ExerciseSet
from steer.fit.data.jsonl import LineReader, sha256_of
from steer.prompts import Prompt, parse_prompt, prompt_json

_CODE = "invalid_preferences"
Side: TypeAlias = Literal["chosen", "rejected"]


def sides_needed(loss: str) -> tuple[Side, ...]:
    """The answers that `loss` compares: plain likelihood has none to avoid."""
    return ("chosen",) if loss == "lm" else ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """A prompt, and two answers to it: the one to prefer, and the one to avoid.

    `cut` names the answers that stop where the model was stopped, so that their end says nothing.
    """

    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    cut: frozenset[Side] = frozenset()


@dataclass(frozen=True)
class PreferenceSet:
    """Preferences with the hash of the data they came from."""

    items: tuple[Preference, ...]
    sha256: str

    @staticmethod
    def of(items: Sequence[Preference]) -> PreferenceSet:
        """A set from memory."""
        values = [
            {
                "prompt": prompt_json(one.prompt),
                **{k: v for k in ("chosen", "rejected") if (v := getattr(one, k)) is not None},
            }
            for one in items
        ]
        return PreferenceSet(tuple(items), sha256_of(values))

    def without(self, side: Side) -> int:
        """How many prompts have no such answer."""
        return sum(getattr(one, side) is None for one in self.items)

    def exercises(self) -> ExerciseSet:
        """The prompts with the answers to prefer, for methods that learn to give them.

        Assumes: no answer to prefer is missing.
        """
        return ExerciseSet.of([Exercise(one.prompt, one.chosen or "") for one in self.items])

    def __len__(self) -> int:
        return len(self.items)


def read_preferences(path: Path) -> PreferenceSet:
    """The preferences of a JSON lines file. Raises `FileFormatError` that names the line."""
    found = _reader(path).read(_preference)
    return PreferenceSet(found.items, found.sha256)


def parse_preferences(data: bytes, source: str) -> PreferenceSet:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    found = _reader(Path(source)).read_bytes(data, _preference)
    return PreferenceSet(found.items, found.sha256)


def require_answers(given: PreferenceSet, instruction: str | None, sides: Sequence[Side]) -> None:
    """Raises `SteerError` where answers are missing and there is no instruction to ask with."""
    for side in sides:
        if instruction is None and given.without(side):
            number = next(n for n, one in enumerate(given.items, 1) if getattr(one, side) is None)
            raise SteerError(
                f"prompt {number} has no {side!r} answer: give it, or an instruction with which "
                "the model answers as it should",
                param="/instruction",
                code="no_answers",
            )


def _reader(path: Path) -> LineReader:
    shape = '{"prompt": …, "chosen": …, "rejected": …}'
    return LineReader(path, "preference", shape, _CODE)


def _preference(value: Any, at: str) -> Preference:
    known = {"prompt", "chosen", "rejected"}
    if not isinstance(value, dict) or "prompt" not in value or not value.keys() <= known:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise FileFormatError(
            f"{at}: a preference is an object with 'prompt' and, unless the model is to answer, "
            f"'chosen' and 'rejected'; got {found!r}",
            code=_CODE,
        )
    for side in ("chosen", "rejected"):
        if side in value and (not isinstance(value[side], str) or not value[side]):
            raise FileFormatError(f"{at}: {side!r} must be a text; got {value[side]!r}", code=_CODE)
    prompt = parse_prompt(value["prompt"], at, "'prompt'", _CODE)
    return Preference(prompt, value.get("chosen"), value.get("rejected"))
