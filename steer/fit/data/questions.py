"""Questions about states, with true answers: JSON lines, `{"prompt", "question", "answer"}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import FileFormatError
from steer.fit.data.jsonl import LineReader, check_keys, sha256_of
from steer.prompts import Prompt, parse_prompt, prompt_json

MAX_QUESTION = 2048
"""Characters of a question, as when an oracle is asked."""
_KEYS = ("prompt", "question", "answer")
_CODE = "invalid_questions"


@dataclass(frozen=True)
class StateQuestion:
    """What is asked of the state of `prompt`, at the last token of its subject where it names one
    and at its own last token where not; and what is true."""

    prompt: Prompt
    question: str
    answer: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions with the hash of the data they came from."""

    items: tuple[StateQuestion, ...]
    sha256: str

    @staticmethod
    def of(items: Sequence[StateQuestion]) -> QuestionSet:
        """A set from memory."""
        values = [
            {"prompt": prompt_json(one.prompt), "question": one.question, "answer": one.answer}
            for one in items
        ]
        return QuestionSet(tuple(items), sha256_of(values))

    def __len__(self) -> int:
        return len(self.items)


def read_questions(path: Path) -> QuestionSet:
    """The questions of a JSON lines file. Raises `FileFormatError` that names the line."""
    found = _reader(path).read(_question)
    return QuestionSet(found.items, found.sha256)


def parse_questions(data: bytes, source: str) -> QuestionSet:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    found = _reader(Path(source)).read_bytes(data, _question)
    return QuestionSet(found.items, found.sha256)


def _reader(path: Path) -> LineReader:
    return LineReader(path, "question", '{"prompt": …, "question": …, "answer": …}', _CODE)


def _question(value: Any, at: str) -> StateQuestion:
    found = check_keys(value, _KEYS, at, "question", _CODE)
    for key in _KEYS[1:]:
        if not isinstance(found[key], str) or not found[key]:
            raise FileFormatError(f"{at}: {key!r} must be a text; got {found[key]!r}", code=_CODE)
    if len(found["question"]) > MAX_QUESTION:
        raise FileFormatError(
            f"{at}: 'question' has {len(found['question'])} characters, and a question has at most "
            f"{MAX_QUESTION}",
            code=_CODE,
        )
    return StateQuestion(
        parse_prompt(found["prompt"], at, "'prompt'", _CODE), found["question"], found["answer"]
    )
