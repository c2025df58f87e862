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
from steer.spec import Site

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
    site: Site | None = None,
    zero_rows: bool = False,
    **kept: Any,
) -> ControlVector:
    """The vector of a foreign file from its rows by the file's own layer numbers.

    Without a word from the sender, layer N is block N. The card records the format, the tool where
    it is known, the offset, the file's own names and its hash. `site` is what the file says, which
    the sender may overrule. `zero_rows` leaves out the zeros that some tools write for
    layers without a direction. Raises `FileFormatError`.
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
        site=_site(options, source, site),
        provenance=provenance,
    )


def _site(options: ImportOptions, source: Source | None, said: Site | None) -> Site:
    """Where rows belong: what the sender says, else the file, else its writer's convention."""
    return options.site or said or (source and source.site) or "resid_post"


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


def single_row(
    name: str,
    row: Tensor,
    path: Path,
    format: str,
    options: ImportOptions,
    *,
    layer: int | None = None,
    site: Site | None = None,
    ask_site: bool = True,
) -> ControlVector:
    """The vector from one direction, on the layers that the sender says, else the file (`layer`).

    Those are 0-based blocks, so no offset applies. A layer's number alone does not say whether the
    row was read before that block or after it, so with `ask_site` somebody must have: the file
    (`site`), or the sender.
    """
    source = writer_of_one(options, format)
    layers = options.layers or (None if layer is None else (layer,))
    if layers is None:
        raise SteerError(
            f"the file holds a single direction, {name!r}, without a layer: state in 'layers' the "
            f"0-based block where it belongs, and {_WHICH_SIDE}",
            code="layer_required",
            param="/layers",
        )
    if ask_site and source is None and options.site is None and site is None:
        raise SteerError(
            f"layer {layers[0]} does not say which side of that block the direction {name!r} was "
            f"read at: state {_WHICH_SIDE}",
            code="site_required",
            param="/site",
        )
    rows = dict.fromkeys(layers, NamedRow(name, row))
    return ControlVector.of(
        dict.fromkeys(layers, row),
        site=_site(options, source, site),
        provenance=origin(path, format, 0, rows, options.source),
    )


def writer_of_one(options: ImportOptions, format: str) -> Source | None:
    """The writer that the sender names for a file of one row; raises for one whose word says how
    the rows of an array are counted."""
    source = options.writer(format)
    if source is not None and source.layer_offset:
        raise SteerError(
            f"from {options.source!r} says how the rows of an array are counted, and this file has "
            "one row: state from 'blocks', and in 'layers' the 0-based block whose output it is "
            "(hidden_states[k] is the output of block k - 1)",
            code="invalid_option",
            param="/from",
        )
    return source


_WHICH_SIDE = (
    "'from' blocks for a row read at the block's output, from refusal-direction for one read at "
    "its input (as the 'layer' of direction_metadata.json counts), or the 'site' itself"
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
