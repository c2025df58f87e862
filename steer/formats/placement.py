"""From a file's layer numbers to ours: 0-based decoder blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from steer.errors import FileFormatError

T = TypeVar("T")


def shift(rows: Mapping[int, T], offset: int) -> dict[int, T]:
    """`rows` with `offset` added to each layer; raises if one would come before block 0."""
    lowest = min(rows, default=0) + offset
    if lowest < 0:
        raise FileFormatError(
            f"with a layer offset of {offset}, the file's layer {lowest - offset} would become "
            f"{lowest}: blocks are numbered from 0",
            code="invalid_layer_offset",
            param="/layer_offset",
        )
    return {layer + offset: row for layer, row in rows.items()}
