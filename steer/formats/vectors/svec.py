"""`.svec` of IBM's activation-steering: JSON with a list of numbers for each block.

`directions` maps 0-based decoder blocks to rows; `model_type` and `explained_variances` go on the
card as provenance. The numbers are read one list at a time: as Python objects, all of them together
would take many times the file.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, TooLarge
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, placed

MAX_BYTES = 64 << 20
_MAX_LIST = 4 << 20
_MAX_REST = 1 << 20
_NUMBERS = re.compile(rb"\[[\s\d.,eE+\-]*\]")
_LAYER = re.compile(r"0|[1-9]\d{0,5}")


def read_svec(path: Path, options: ImportOptions) -> ControlVector:
    """The vector in a `.svec` file. Raises `FileFormatError` or `TooLarge`."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TooLarge(
            f"the JSON file has {size} bytes; at most {MAX_BYTES} are read: send it as safetensors",
            code="upload_too_large",
        )
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        lists = [match.span() for match in _NUMBERS.finditer(text)]
        about = _rest(text, lists)
        rows = _rows(text, lists, about)
    kept: dict[str, Any] = {}
    if isinstance(about.get("model_type"), str):
        kept["model_type"] = about["model_type"][:200]
    variances = about.get("explained_variances")
    if isinstance(variances, dict) and all(_is_number(value) for value in variances.values()):
        known = {key: value for key, value in variances.items() if key in map(str, rows)}
        kept["explained_variances"] = known
    return placed(rows, path, "svec", options, tool="activation-steering", **kept)


def _rest(text: mmap.mmap, lists: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The file's object, with each list of numbers replaced by a list of its own index."""
    parts: list[bytes] = []
    before = size = 0
    for index, (start, end) in enumerate([*lists, (len(text), len(text))]):
        size += start - before
        if size > _MAX_REST or index > _MAX_REST // 16:
            raise TooLarge(
                f"the JSON file holds more than {_MAX_REST} bytes besides lists of numbers: a "
                ".svec file has little else",
                code="too_large",
            )
        parts += [text[before:start], b"[%d]" % index]
        before = end
    try:
        about = json.loads(b"".join(parts[:-1]), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"the file is not JSON: {str(error)[:200]}", code="invalid_json"
        ) from None
    if not isinstance(about, dict):
        raise FileFormatError("the JSON file does not hold an object", code="unknown_layout")
    return about


def _rows(
    text: mmap.mmap, lists: Sequence[tuple[int, int]], about: dict[str, Any]
) -> dict[int, NamedRow]:
    directions = about.get("directions")
    if not isinstance(directions, dict) or not directions:
        raise FileFormatError(
            "the JSON file is not a control vector: a .svec file has 'directions', an object from "
            f"layers to lists of numbers; this one has {', '.join(map(repr, list(about)[:5]))}",
            code="unknown_layout",
        )
    rows: dict[int, NamedRow] = {}
    for layer, value in directions.items():
        if not _LAYER.fullmatch(layer):
            raise FileFormatError(f"{layer[:80]!r} in 'directions' is not the number of a layer")
        start, end = lists[_index(layer, value)]
        rows[int(layer)] = NamedRow(layer, _row(layer, text[start : min(end, start + _MAX_LIST)]))
    return rows


def _index(layer: str, value: Any) -> int:
    """Which list of numbers `value` stands for; some versions wrap a row once more, as [[…]]."""
    inner = value[0] if isinstance(value, list) and len(value) == 1 else None
    if isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    if type(inner) is not int:
        raise _not_numbers(layer)
    return inner


def _row(layer: str, text: bytes) -> Tensor:
    try:
        values = json.loads(text)
    except ValueError:
        raise _not_numbers(layer) from None
    if not all(_is_number(value) for value in values):
        raise _not_numbers(layer)
    return torch.tensor(values, dtype=torch.float32)


def _not_numbers(layer: str) -> FileFormatError:
    return FileFormatError(
        f"layer {layer} in 'directions' is not one list of finite numbers, of {_MAX_LIST} bytes "
        "at most"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 1 << 53
    return type(value) is float and math.isfinite(value)
