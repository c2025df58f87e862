"""Texts with what they say: fillers by their roles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, ValidationError

from steer.artefacts.concepts.form import ConceptName
from steer.errors import FileFormatError
from steer.fit.data.jsonl import DataSet, LineReader, sha256_of
from steer.prompts import PromptInput

_SHAPE = '{"text": …, "pairs": {ROLE: FILLER}}'
_CODE = "invalid_examples"


class SaidText(PromptInput):
    """A text and what it says: fillers by their roles, such as {"country": "France"}."""

    pairs: Annotated[dict[ConceptName, ConceptName], Field(min_length=1, max_length=16)]


SaidTexts: TypeAlias = DataSet[SaidText]


def said_texts(items: Sequence[SaidText]) -> SaidTexts:
    """What came in a request."""
    lines = [one.model_dump(mode="json", exclude_defaults=True) for one in items]
    return DataSet(tuple(items), sha256_of(lines))


def read_said(path: Path) -> SaidTexts:
    """Those of a JSON lines file. Raises `FileFormatError` that names the line."""
    return LineReader(path, "example", _SHAPE, _CODE).read(_said)


def parse_said(data: bytes, source: str) -> SaidTexts:
    """Those of JSON lines that are called `source` in errors. Raises `FileFormatError`."""
    return LineReader(Path(source), "example", _SHAPE, _CODE).read_bytes(data, _said)


def _said(value: Any, at: str) -> SaidText:
    try:
        return SaidText.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"/{part}" for part in first["loc"])
        raise FileFormatError(
            f"{at}: an example is {_SHAPE}, or has 'messages' or 'tokens' in the place of 'text'; "
            f"{where or 'it'}: {first['msg']}",
            code=_CODE,
        ) from None
