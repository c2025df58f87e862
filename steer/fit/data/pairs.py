"""Contrastive prompts: the data that a vector is fitted on.

A file is JSON lines, `{"positive": PROMPT, "negative": PROMPT}`, with prompts as
`steer.prompts` describes them; or one prompt with two answers, as preferences and the data of
contrastive activation addition have it (`_ANSWERED`). In an array a pair may be a list of two, the
positive one first, as other packages take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.fit.data.jsonl import LineReader, check_keys, sha256_of
from steer.fit.data.tables import is_chat
from steer.prompts import Messages, Prompt, parse_prompt, prompt_json, render

__all__ = ["Messages", "Pair", "PairSet", "Prompt", "read_pairs", "read_prompts", "render"]


@dataclass(frozen=True)
class Pair:
    """A prompt that has the attribute, and the one most like it that has not."""

    positive: Prompt
    negative: Prompt


@dataclass(frozen=True)
class PairSet:
    """Pairs with the hash of the data they came from."""

    items: tuple[Pair, ...]
    sha256: str

    @staticmethod
    def of(pairs: Sequence[Pair]) -> PairSet:
        """A set from memory, hashed as the file that `read_pairs` would read it from."""
        values = [
            {"positive": prompt_json(p.positive), "negative": prompt_json(p.negative)}
            for p in pairs
        ]
        return PairSet(tuple(pairs), sha256_of(values))

    def __len__(self) -> int:
        return len(self.items)


def read_pairs(path: Path) -> PairSet:
    """The pairs of a JSON lines file. Raises `FileFormatError` that names the line."""
    reader = _reader(path)
    found = reader.read(_pair)
    return PairSet(found.items, found.sha256)


def parse_pairs(data: bytes, source: str) -> PairSet:
    """The pairs of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    found = _reader(Path(source)).read_bytes(data, _pair)
    return PairSet(found.items, found.sha256)


def _reader(path: Path) -> LineReader:
    return LineReader(path, "pair", '{"positive": …, "negative": …}', "invalid_pairs")


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts to generate from: JSON lines, each a text, messages, or an object with `messages`,
    `prompt` or `text`. Raises `FileFormatError` that names the line."""
    return list(_prompt_reader(path).read(_loose_prompt).items)


def parse_prompts(data: bytes, source: str) -> list[Prompt]:
    """The prompts of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    return list(_prompt_reader(Path(source)).read_bytes(data, _loose_prompt).items)


def _prompt_reader(path: Path) -> LineReader:
    return LineReader(path, "prompt", "text or list of messages", "invalid_pairs")


_ANSWERED = (
    ("prompt", "chosen", "rejected"),
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),  # 2312.06681
)
"""Fields of one prompt, the answer that has the attribute, and the one that has not; beside them
files hold what they like."""


def _pair(value: Any, at: str) -> Pair:
    for prompt, *answers in _ANSWERED:
        if isinstance(value, dict) and value.keys() >= {prompt, *answers}:
            each = [{"prompt": value[prompt], "response": value[answer]} for answer in answers]
            positive, negative = (
                parse_prompt(one, at, f"{prompt!r} with {answer!r}")
                for one, answer in zip(each, answers, strict=True)
            )
            return Pair(positive, negative)
    if isinstance(value, list) and len(value) == 2 and not is_chat(value):
        value = dict(zip(("positive", "negative"), value, strict=True))
    pair = check_keys(value, ("positive", "negative"), at, "pair", "invalid_pairs")
    return Pair(
        parse_prompt(pair["positive"], at, "'positive'"),
        parse_prompt(pair["negative"], at, "'negative'"),
    )


def _loose_prompt(value: Any, at: str) -> Prompt:
    if isinstance(value, dict):
        value = next((value[key] for key in ("messages", "prompt", "text") if key in value), None)
    return parse_prompt(value, at, "a prompt")
