"""Prompts with the answers to learn: JSON lines, `{"prompt": PROMPT, "answer": TEXT}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import FileFormatError
from steer.fit.data.jsonl import LineReader, check_keys, sha256_of
from steer.prompts import Prompt, parse_prompt, prompt_json

_CODE = "invalid_exercises"


@dataclass(frozen=True)
class Exercise:
    """A prompt and the answer to it."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class ExerciseSet:
    """Exercises with the hash of the data they came from."""

    items: tuple[Exercise, ...]
    sha256: str

    @staticmethod
    def of(items: Sequence[Exercise]) -> ExerciseSet:
        """A set from memory."""
        values = [{"prompt": prompt_json(one.prompt), "answer": one.answer} for one in items]
        return ExerciseSet(tuple(items), sha256_of(values))

    def __len__(self) -> int:
        return len(self.items)


def read_exercises(path: Path) -> ExerciseSet:
    """The exercises of a JSON lines file. Raises `FileFormatError` that names the line."""
    found = _reader(path).read(_exercise)
    return ExerciseSet(found.items, found.sha256)


def parse_exercises(data: bytes, source: str) -> ExerciseSet:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    found = _reader(Path(source)).read_bytes(data, _exercise)
    return ExerciseSet(found.items, found.sha256)


def _reader(path: Path) -> LineReader:
    return LineReader(path, "exercise", '{"prompt": …, "answer": …}', _CODE)


def _exercise(value: Any, at: str) -> Exercise:
    both = check_keys(value, ("prompt", "answer"), at, "exercise", _CODE)
    if not isinstance(both["answer"], str) or not both["answer"]:
        raise FileFormatError(f"{at}: 'answer' must be a text; got {both['answer']!r}", code=_CODE)
    return Exercise(parse_prompt(both["prompt"], at, "'prompt'", _CODE), both["answer"])
