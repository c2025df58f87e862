"""Vectors as plain arrays, whatever file they lie in: rows named by layer, a matrix, or one row.

Safetensors, `.npz`, `.pt` and JSON differ in how numbers are stored and agree in this.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.sae.hook_names import parse_hook_name
from steer.errors import FileFormatError
from steer.formats.claims import check_claims
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, matrix_rows, placed, require_offset, single_row
from steer.spec import Site

_ROW = re.compile(
    r"(?:[A-Za-z_]\w*\.)*?(?:(?:layers?|directions?|blocks?|vectors?|h)[._])?(\d{1,6})(\.input)?"
)
_MATRIX, _STACK = 2, 3
_FOREIGN_WEIGHTS = re.compile(
    r"lora_|ia3_|(?:^|\.)(?:embed_tokens|wte|lm_head)\.weight$|"
    r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\..+\.weight$"
)
# A dictionary of a pickle may even hold itself.
MOST_WRAPPERS = 4
_LAYER_KEYS = ("layer", "layerNumber", "layer_idx", "layer_index")


def vector_of_arrays(
    names: Collection[str],
    load: Callable[[], Mapping[str, Tensor]],
    path: Path,
    format: str,
    options: ImportOptions,
    *,
    about: Mapping[str, Any],
    layer: int | None = None,
    asks: bool = True,
) -> ControlVector:
    """The vector in the arrays called `names`, which are loaded once their names are found good.

    `about` is what the file says beside them, `layer` the layer that it gives for its one row. With
    `asks`, a matrix needs to be told what its row 0 is, and a row which side of its block it is.
    Raises `FileFormatError` or `SteerError`.
    """
    if weights := sorted(filter(is_foreign_weight, names)):
        raise foreign_weights(weights[0])
    site = check_claims(about, options)
    places = {name: row_place(name) for name in names}
    if names and all(places.values()):
        layers = {name: place for name, place in places.items() if place is not None}
        return _numbered(layers, load(), path, format, options, site)
    if len(names) != 1:
        raise _not_layers(sorted(name for name, place in places.items() if place is None))
    ((name, array),) = load().items()
    if array.ndim == _STACK and 1 in array.shape[:2]:
        array = array.reshape(-1, array.shape[-1])
    row = as_row(array)
    if row.ndim == 1:
        return single_row(name, row, path, format, options, layer=layer, site=site, ask_site=asks)
    if row.ndim != _MATRIX:
        raise FileFormatError(
            f"the array {name[:80]!r} has the shape {list(array.shape)}; read are [d] and "
            "[layers, d]"
        )
    rows = matrix_rows(name, row)
    if asks:
        require_offset(format, options, list(array.shape))
    if options.layer_offset is not None and options.layer_offset < 0 and not asks:
        # What an offset puts before block 0 is the embeddings, as `hidden-states` says.
        rows = {place: one for place, one in rows.items() if place >= -options.layer_offset}
    return placed(rows, path, format, options, site=site)


def is_foreign_weight(name: str) -> bool:
    """Whether an array is called as weights of a model or of a PEFT adapter are."""
    return _FOREIGN_WEIGHTS.search(name) is not None


def row_place(name: str) -> tuple[int, Site | None] | None:
    """The layer that a row's name ends in, and the site where the name says one; else None.

    Read are `3`, `layer_3`, `direction.3`, `model.layers.3`, `model.layers.3.mlp` and
    TransformerLens' `blocks.3.hook_resid_pre`.
    """
    match = _ROW.fullmatch(name)
    if match is not None:
        return int(match[1]), "resid_pre" if match[2] else None
    try:
        point = parse_hook_name(name)
    except FileFormatError:
        return None
    return point.layer, point.site


def layer_beside(about: dict[str, Any]) -> int | None:
    """Takes from `about` the one layer that a file gives for its one row, if it does."""
    layer = next((about.pop(key) for key in _LAYER_KEYS if key in about), None)
    if layer is not None and (type(layer) is not int or layer < 0):
        raise FileFormatError(f"the file has the layer {reprlib.repr(layer)}, not a block's number")
    return layer


def as_row(array: Tensor) -> Tensor:
    """An array [1, d] or [d, 1] as the row [d] that it is; any other as it is."""
    long = [length for length in array.shape if length != 1]
    return array.reshape(-1) if array.ndim > 1 and len(long) == 1 else array


def _numbered(
    places: Mapping[str, tuple[int, Site | None]],
    arrays: Mapping[str, Tensor],
    path: Path,
    format: str,
    options: ImportOptions,
    site: Site | None,
) -> ControlVector:
    rows: dict[int, NamedRow] = {}
    for name, (layer, _) in places.items():
        if layer in rows:
            raise FileFormatError(
                f"the file has two arrays for layer {layer}, {rows[layer].name!r} and {name!r}",
                code="duplicate_layer",
            )
        rows[layer] = NamedRow(name, as_row(arrays[name]))
    sites = {said for _, said in places.values() if said is not None}
    if len(sites) > 1 or (sites and site not in (None, *sites)):
        raise FileFormatError(
            f"the file has rows for several sites, {', '.join(sorted({*sites, site or ''} - {''}))}"
            ": a vector acts at one; send a file for each",
            code="unknown_layout",
        )
    return placed(rows, path, format, options, site=next(iter(sites), site))


def _not_layers(odd: list[str]) -> FileFormatError:
    if odd and all(re.fullmatch(r"-\d+", name) for name in odd):
        return FileFormatError(
            f"the file counts its layers from the model's end ({odd[0]}, …), and does not say how "
            "many that model has: name its rows by 0-based block",
            code="unknown_layout",
        )
    return FileFormatError(
        "the file is not a control vector: its arrays must be named by layer (0, 1, …, layers.0, "
        f"layer_0, model.layers.0, …); got {', '.join(map(repr, odd[:5])) or 'none'}",
        code="unknown_layout",
    )


def foreign_weights(name: str) -> FileFormatError:
    """The error for weights of a model or of a PEFT adapter."""
    return FileFormatError(
        f"the file holds weights of a model or of a PEFT adapter ({name[:80]!r}), and Steer edits "
        "activations: merge the adapter into its model (merge_and_unload) and serve that, or let "
        "the engine load it (vLLM's --enable-lora)",
        code="model_weights",
    )
