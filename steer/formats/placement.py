"""From a file's layer numbers to ours: 0-based decoder blocks; and what is recorded of that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, SteerError
from steer.formats.options import ImportOptions
from steer.formats.sources import Source

T = TypeVar("T")
_BLOCK = 1 << 20


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


@dataclass(frozen=True)
class NamedRow:
    """A row as a file holds it, under the file's own name for it."""

    name: str
    row: Tensor


def placed(
    rows: Mapping[int, NamedRow],
    path: Path,
    format: str,
    options: ImportOptions,
    *,
    tool: str | None = None,
    zero_rows: bool = False,
    **kept: Any,
) -> ControlVector:
    """The vector of a foreign file from its rows by the file's own layer numbers.

    Without a word from the sender, layer N is block N. The card records the format, the tool where
    it is known, the offset, the file's own names and its hash. `zero_rows` leaves out the
    zeros that some tools write for layers without a direction. Raises `FileFormatError`.
    """
    source = options.writer(format) or Source(frozenset())
    offset = source.layer_offset if options.layer_offset is None else options.layer_offset
    if source.counts_embeddings:
        rows = {layer: named for layer, named in rows.items() if layer + offset >= 0}
    if zero_rows:
        rows = {n: named for n, named in rows.items() if bool(named.row.any())} or rows
    blocks = shift(rows, offset)
    provenance = origin(path, format, offset, blocks, tool or options.source) | kept
    return ControlVector.owning(
        {layer: named.row for layer, named in blocks.items()},
        site=source.site,
        provenance=provenance,
    )


def matrix_rows(name: str, matrix: Tensor) -> dict[int, NamedRow]:
    """The rows of an array [L, d], numbered from 0."""
    return {place: NamedRow(f"{name}[{place}]", row) for place, row in enumerate(matrix)}


def require_offset(format: str, options: ImportOptions, shape: list[int]) -> None:
    """Raises unless the sender has said what row 0 of an array is."""
    if options.offset(format) is None:
        raise SteerError(
            f"the array of shape {shape} does not say what its row 0 is: state 'from' (blocks: "
            "row k is the output of block k; hidden-states or persona-vectors: row 0 is the "
            "embeddings, row k the output of block k - 1), or a 'layer_offset'",
            code="layer_offset_required",
            param="/layer_offset",
        )


def single_row(name: str, row: Tensor, options: ImportOptions) -> dict[int, NamedRow]:
    """A direction without a layer, on the layers that the sender says.

    Those are 0-based blocks already, so no offset applies: the result is for `on_blocks`.
    """
    if options.layers is None:
        raise SteerError(
            f"the file holds a single direction, {name!r}, without a layer: say in 'layers' where "
            "it belongs",
            code="layer_required",
            param="/layers",
        )
    return dict.fromkeys(options.layers, NamedRow(name, row))


def on_blocks(
    rows: Mapping[int, NamedRow], path: Path, format: str, options: ImportOptions, **kept: Any
) -> ControlVector:
    """The vector from rows that are numbered by block already."""
    source = options.writer(format)
    return ControlVector.of(
        {layer: named.row for layer, named in rows.items()},
        site=source.site if source else "resid_post",
        provenance=origin(path, format, 0, rows, options.source) | kept,
    )


def origin(
    path: Path, format: str, offset: int, rows: Mapping[int, NamedRow], tool: str | None
) -> dict[str, Any]:
    """What a card's provenance records of a foreign file; `rows` are numbered by block."""
    found: dict[str, Any] = {
        "format": format,
        "layer_offset": offset,
        "layer_names": {str(layer): named.name for layer, named in rows.items()},
        "file_sha256": file_hash(path),
    }
    return found | ({"tool": tool} if tool else {})


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
