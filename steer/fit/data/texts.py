"""Texts whose states are read: whatever file a fit takes, and token ids.

A file is JSON lines: a text, messages, `{"tokens": [IDS]}`, or an object with one of `text`,
`messages` and `prompt`, beside which `response`, `subject`, `label`, `labels` and the `pairs` of
roles and fillers may stand; a pair
`{"positive": …, "negative": …}` is two texts. So the states of a file's texts are found again by
the fit that reads the same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from steer.errors import FileFormatError
from steer.fit.data.jsonl import LineReader
from steer.prompts.forms import Marked, Prompt, parse_prompt

_CODE = "invalid_texts"
_SHAPE = 'text, list of messages, or {"tokens": […]}'
_SIDES = ("positive", "negative")
_SOURCES = ("text", "messages", "prompt")
_BESIDE = frozenset({"label", "labels", "pairs"})

Tokens: TypeAlias = tuple[int, ...]
GivenText: TypeAlias = Prompt | Tokens
"""What is read: a prompt, or the tokens themselves."""


@dataclass(frozen=True)
class GivenTexts:
    """Texts, and for each the number of the item of the data that it came from."""

    texts: tuple[GivenText, ...]
    items: tuple[int, ...]

    @staticmethod
    def of(items: Sequence[Sequence[GivenText]]) -> GivenTexts:
        """The texts of each item."""
        return GivenTexts(
            tuple(text for one in items for text in one),
            tuple(number for number, one in enumerate(items) for _ in one),
        )

    def __len__(self) -> int:
        return len(self.texts)


def token_ids(given: GivenText) -> Tokens | None:
    """`given` where it is token ids; a chat is a list of messages."""
    if isinstance(given, tuple) and all(type(one) is int for one in given):
        return cast("Tokens", given)
    return None


def read_texts(path: Path) -> GivenTexts:
    """The texts of a JSON lines file. Raises `FileFormatError` that names the line."""
    return GivenTexts.of(_reader(path).read(_texts).items)


def parse_texts(data: bytes, source: str) -> GivenTexts:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    return GivenTexts.of(_reader(Path(source)).read_bytes(data, _texts).items)


def _reader(path: Path) -> LineReader:
    return LineReader(path, "text", _SHAPE, _CODE)


def _texts(value: Any, at: str) -> tuple[GivenText, ...]:
    if not isinstance(value, dict):
        return (parse_prompt(value, at, "a text", _CODE),)
    keys = set(value)
    if keys == {"tokens"}:
        return (_ids(value["tokens"], at),)
    if keys == set(_SIDES):
        return tuple(parse_prompt(value[side], at, f"'{side}'", _CODE) for side in _SIDES)
    sources = [key for key in _SOURCES if key in value]
    marks = {key: value[key] for key in ("response", "subject") if key in value}
    if len(sources) != 1 or keys - {sources[0], *marks} - _BESIDE:
        raise FileFormatError(
            f"{at}: a text is a {_SHAPE}, a pair with 'positive' and 'negative', or an object with "
            f"one of 'text', 'messages' and 'prompt'; got the keys {sorted(value)!r}",
            code=_CODE,
        )
    what = f"'{sources[0]}'"
    found = parse_prompt(value[sources[0]], at, what, _CODE)
    if not marks:
        return (found,)
    if isinstance(found, Marked):
        raise FileFormatError(f"{at}: {what} has marks of its own beside others", code=_CODE)
    return (parse_prompt({"prompt": value[sources[0]], **marks}, at, "a text", _CODE),)


def _ids(value: Any, at: str) -> Tokens:
    if isinstance(value, list) and value and all(type(one) is int and one >= 0 for one in value):
        return tuple(value)
    raise FileFormatError(f"{at}: 'tokens' is a list of token ids, at least one", code=_CODE)
