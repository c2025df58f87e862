"""Contrastive prompts: the data that a vector is fitted on.

A file is JSON lines, `{"positive": PROMPT, "negative": PROMPT}`, where a prompt is a text, taken
as it is, or a list of chat messages, which the model's own chat template renders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from steer.errors import FileFormatError, SteerError

Messages: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Messages


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
        lines = [
            json.dumps({"positive": p.positive, "negative": p.negative}, ensure_ascii=False) + "\n"
            for p in pairs
        ]
        return PairSet(tuple(pairs), hashlib.sha256("".join(lines).encode()).hexdigest())

    def __len__(self) -> int:
        return len(self.items)


def read_pairs(path: Path) -> PairSet:
    """The pairs of a JSON lines file. Raises `FileFormatError` that names the line."""
    return parse_pairs(_contents(path), str(path))


def parse_pairs(data: bytes, source: str) -> PairSet:
    """The pairs of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{source!r} is not UTF-8 text: {error}") from error
    pairs = tuple(
        _pair(line, f"{source}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    )
    if not pairs:
        raise FileFormatError(
            f'{source!r} holds no pairs: write one {{"positive": …, "negative": …}} per line',
            code="no_pairs",
        )
    return PairSet(pairs, hashlib.sha256(data).hexdigest())


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts to generate from: JSON lines, each a text, messages, or an object with `messages`
    (or `prompt`). Raises `FileFormatError` that names the line."""
    prompts = []
    for number, line in enumerate(_contents(path).decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        value = _json(line, at)
        if isinstance(value, dict):
            value = value.get("messages", value.get("prompt"))
        prompts.append(_prompt(value, at, "a prompt"))
    if not prompts:
        raise FileFormatError(f"{str(path)!r} holds no prompts", code="no_prompts")
    return prompts


def render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """`prompt` as tokens.

    Messages go through the chat template, with the opening of an answer unless the last message is
    the assistant's. Raises `SteerError` where the template refuses them.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    answered = prompt[-1]["role"] == "assistant"
    if getattr(tokenizer, "chat_template", None) is None:
        raise SteerError(
            "the model's tokenizer has no chat template: give prompts as plain texts",
            code="no_chat_template",
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in prompt],
            tokenize=False,
            add_generation_prompt=not answered,
        )
    except Exception as error:
        # Templates are programs that come with the model; whatever they raise is about the data.
        raise SteerError(
            f"the model's chat template refuses these messages: {error}", code="invalid_messages"
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"{str(path)!r} cannot be read: {error.strerror or error}", code="no_such_file"
        ) from error


def _json(line: str, at: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise FileFormatError(f"{at}: not JSON: {error}", code="invalid_pairs") from error


def _pair(line: str, at: str) -> Pair:
    value = _json(line, at)
    if not isinstance(value, dict) or set(value) != {"positive", "negative"}:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise FileFormatError(
            f"{at}: a pair is an object with exactly the keys 'positive' and 'negative'; "
            f"got {found!r}",
            code="invalid_pairs",
        )
    return Pair(
        _prompt(value["positive"], at, "'positive'"), _prompt(value["negative"], at, "'negative'")
    )


def _prompt(value: Any, at: str, what: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    ):
        return value
    raise FileFormatError(
        f"{at}: {what} must be a text, or a list of messages with 'role' and 'content'",
        code="invalid_pairs",
    )
