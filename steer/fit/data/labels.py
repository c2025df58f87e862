"""Labelled texts: data with any number of classes, fitted one against the rest.

A file is JSON lines, `{"text": TEXT, "label": LABEL}` or `{"messages": MESSAGES, "label": LABEL}`,
or with `prompt` any form that `steer.prompts` describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import FileFormatError, quoted
from steer.fit.data.jsonl import LineReader, sha256_of
from steer.prompts import Prompt, parse_prompt, prompt_json

_CODE = "invalid_labels"


@dataclass(frozen=True)
class Labelled:
    """A prompt and the class it belongs to."""

    prompt: Prompt
    label: str


@dataclass(frozen=True)
class Judged:
    """A prompt, and for some labels whether it has them."""

    prompt: Prompt
    labels: Mapping[str, bool]


@dataclass(frozen=True)
class LabelledSet:
    """Labelled prompts with the hash of the data they came from."""

    items: tuple[Labelled, ...]
    sha256: str

    @staticmethod
    def of(items: Sequence[Labelled]) -> LabelledSet:
        """A set from memory."""
        values = [{"prompt": prompt_json(one.prompt), "label": one.label} for one in items]
        return LabelledSet(tuple(items), sha256_of(values))

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label, in alphabetical order."""
        return tuple(sorted({one.label for one in self.items}))

    def __len__(self) -> int:
        return len(self.items)


def read_labelled(path: Path) -> LabelledSet:
    """The labelled prompts of a JSON lines file. Raises `FileFormatError` that names the line."""
    found = _reader(path).read(_labelled)
    return LabelledSet(found.items, found.sha256)


def parse_labelled(data: bytes, source: str) -> LabelledSet:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    found = _reader(Path(source)).read_bytes(data, _labelled)
    return LabelledSet(found.items, found.sha256)


def read_judged(path: Path) -> tuple[Judged, ...]:
    """Texts of which several things are known: lines with `labels`, an object of true and false,
    or with `label`, which means that the text has none of the others. Raises `FileFormatError`."""
    found = _reader(path).read(_judged).items
    every = {name for one in found if isinstance(one, Labelled) for name in (one.label,)}
    return tuple(
        Judged(one.prompt, {name: name == one.label for name in every})
        if isinstance(one, Labelled)
        else one
        for one in found
    )


def _judged(value: Any, at: str) -> Labelled | Judged:
    if not isinstance(value, dict) or "labels" not in value:
        return _labelled(value, at)
    given = value["labels"]
    labels = {k: truth(v) for k, v in given.items()} if isinstance(given, dict) else {"": given}
    if not all(isinstance(one, bool) for one in labels.values()):
        raise FileFormatError(
            f"{at}: 'labels' is an object of true and false; what is not known is left out; got "
            f"{quoted(given, 200)}",
            code=_CODE,
        )
    rest = {key: one for key, one in value.items() if key != "labels"}
    return Judged(_labelled({**rest, "label": "-"}, at).prompt, labels)


def _reader(path: Path) -> LineReader:
    return LineReader(path, "labelled text", '{"text": …, "label": …}', _CODE)


def truth(value: Any) -> Any:
    """0 and 1, as a table holds what is known of a text, as truth values; any other as it is."""
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def label_text(label: Any) -> Any:
    """A truth value or a whole number as the text that it is as a label; anything else as it is."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # what a table with gaps makes of whole numbers
    return str(label).lower() if isinstance(label, bool | int) else label


def _labelled(value: Any, at: str) -> Labelled:
    sources = ("text", "messages", "prompt")
    given = [key for key in sources if isinstance(value, dict) and key in value]
    if len(given) != 1 or set(value) != {given[0], "label"}:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise FileFormatError(
            f"{at}: a labelled text is an object with 'label' and one of 'text', 'messages' and "
            f"'prompt'; got {found!r}",
            code=_CODE,
        )
    label = label_text(value["label"])
    if not isinstance(label, str) or not label:
        raise FileFormatError(f"{at}: 'label' must be a text or a whole number", code=_CODE)
    return Labelled(parse_prompt(value[given[0]], at, f"'{given[0]}'", _CODE), label)
