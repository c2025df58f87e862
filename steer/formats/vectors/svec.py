"""JSON: `.svec` of IBM's activation-steering, and rows that others write as lists of numbers.

In a `.svec`, `directions` maps 0-based decoder blocks to rows; `model_type` and
`explained_variances` go on the card as provenance. Other JSON is read as other files with arrays
are: an object of lists by layer, a list of rows, or one row. The numbers are read one list at a
time: as Python objects, all of them together would take many times the file.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, TooLarge
from steer.formats.arrays import layer_beside, vector_of_arrays
from steer.formats.claims import check_claims
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, placed

MAX_BYTES = 64 << 20
_MAX_LIST = 4 << 20
_MAX_REST = 1 << 20
_NUMBERS = re.compile(rb"\[[\s\d.,eE+\-]*\]")
_LAYER = re.compile(r"0|[1-9]\d{0,5}")
_KNOWN = ("model_type", "directions", "explained_variances")


def read_svec(path: Path, options: ImportOptions) -> ControlVector:
    """The vector in a JSON file. Raises `FileFormatError`, `TooLarge` or `SteerError`."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TooLarge(
            f"the JSON file has {size} bytes; at most {MAX_BYTES} are read: send it as safetensors",
            code="upload_too_large",
        )
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        lists = [match.span() for match in _NUMBERS.finditer(text)]
        about = _rest(text, lists)
        if not isinstance(about, dict) or "directions" not in about:
            return _plain_lists(_Lists(text, lists), about, path, options)
        rows = _rows(_Lists(text, lists), about)
    kept: dict[str, Any] = {}
    if isinstance(about.get("model_type"), str):
        kept["model_type"] = about["model_type"][:200]
    variances = about.get("explained_variances")
    if isinstance(variances, dict) and all(_is_number(value) for value in variances.values()):
        known = {key: value for key, value in variances.items() if key in map(str, rows)}
        kept["explained_variances"] = known
    beside = {key: value for key, value in about.items() if key not in _KNOWN}
    site = check_claims(beside, options)
    return placed(rows, path, "svec", options, tool="activation-steering", site=site, **kept)


@dataclass(frozen=True)
class _Lists:
    """The lists of numbers in a JSON text, by their index."""

    text: mmap.mmap
    spans: Sequence[tuple[int, int]]

    def row(self, name: str, index: int) -> Tensor:
        """The list as float32; `name` is what errors call it."""
        start, end = self.spans[index]
        return _row(name, self.text[start : min(end, start + _MAX_LIST)])


def _plain_lists(lists: _Lists, held: Any, path: Path, options: ImportOptions) -> ControlVector:
    """The vector in JSON that is no `.svec`: arrays by name, and what stands beside them."""
    while isinstance(held, dict) and len(held) == 1 and isinstance(next(iter(held.values())), dict):
        (held,) = held.values()
    named = held if isinstance(held, dict) else {"array": held}
    found = {name: places for name, value in named.items() if (places := _places(value))}
    if not found:
        raise FileFormatError(
            "the JSON file is not a control vector: it holds rows of numbers as lists, by layer or "
            "under 'directions' as a .svec does; this one has "
            f"{', '.join(repr(name[:80]) for name in list(named)[:5]) or 'nothing'}",
            code="unknown_layout",
        )
    about = {name: value for name, value in named.items() if name not in found}
    layer = layer_beside(about)

    def load() -> dict[str, Tensor]:
        return {name: _array(lists, name, places) for name, places in found.items()}

    return vector_of_arrays(found, load, path, "json", options, about=about, layer=layer)


def _places(value: Any) -> list[int] | None:
    """Which lists of numbers make an array: one of them, or a list of them; else None."""
    value = _unwrapped(value)
    if not isinstance(value, list) or not value:
        return None
    inner = [_unwrapped(one) for one in value] if len(value) > 1 else [value]
    found = [one[0] for one in inner if isinstance(one, list) and len(one) == 1]
    return found if len(found) == len(inner) and all(type(n) is int for n in found) else None


def _unwrapped(value: Any) -> Any:
    """Without the lists of one list that stand around it."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        (value,) = value
    return value


def _array(lists: _Lists, name: str, places: Sequence[int]) -> Tensor:
    rows = [lists.row(name, place) for place in places]
    if len({len(row) for row in rows}) != 1:
        raise FileFormatError(f"the lists in {name[:80]!r} differ in length", code="mixed_widths")
    return torch.stack(rows)


def _rest(text: mmap.mmap, lists: Sequence[tuple[int, int]]) -> Any:
    """What the file holds, with each list of numbers replaced by a list of its own index."""
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
        return json.loads(b"".join(parts[:-1]), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"the file is not JSON: {str(error)[:200]}", code="invalid_json"
        ) from None


def _rows(lists: _Lists, about: dict[str, Any]) -> dict[int, NamedRow]:
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
        rows[int(layer)] = NamedRow(layer, lists.row(layer, _index(layer, value)))
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
        f"{layer[:80]!r} is not one list of finite numbers, of {_MAX_LIST} bytes at most"
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
