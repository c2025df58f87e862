"""Control vectors in `.pt` files: persona vectors, refusal directions, and plain dictionaries.

- a dictionary of rows by layer (`3`, `"layer_3"`, …);
- an array [L, d], about which the sender must say what its row 0 is: `from` persona-vectors
  (`{trait}_response_avg_diff.pt`, [L+1, d]: row k is `hidden_states[k]`) or blocks;
- an array [pos, L, d], `mean_diffs.pt` of refusal_direction (2406.11717): means of the *inputs* of
  layers at the last positions of the prompt, of which the sender chooses one;
- one row [d], whose layer the sender or a `direction_metadata.json` beside it says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, SteerError
from steer.formats.guards.torch import load_tensors
from steer.formats.options import ImportOptions
from steer.formats.placement import (
    NamedRow,
    matrix_rows,
    on_blocks,
    placed,
    require_offset,
    single_row,
)

DIRECTION, METADATA = "direction.pt", "direction_metadata.json"
MAX_METADATA_BYTES = 1 << 20
_ROW = re.compile(r"(?:(?:layers?|directions?|blocks?)[._])?(0|[1-9]\d{0,5})")


def read_torch(path: Path, options: ImportOptions) -> ControlVector:
    """The vector in a `.pt` file. Raises `FileFormatError` or `SteerError`."""
    held = load_tensors(path)
    if isinstance(held, dict):
        return _by_layer(path, held, options)
    if not isinstance(held, Tensor):
        raise FileFormatError(
            f"the file holds a {type(held).__name__}: a control vector is a tensor, or a "
            "dictionary of rows by layer",
            code="unknown_layout",
        )
    tensor = _float(path.name, held)
    shape = list(tensor.shape)
    if tensor.ndim == 3:
        return _mean_differences(path, tensor, options)
    if tensor.ndim == 2 and shape[0] > 1:
        if options.source == "refusal-direction":
            raise FileFormatError(f"mean_diffs.pt has three dimensions; this one has {shape}")
        require_offset("torch", options, shape)
        return placed(matrix_rows("tensor", tensor), path, "torch", options)
    if tensor.ndim not in (1, 2):
        raise FileFormatError(
            f"the file's tensor has the shape {shape}; read are [d], [layers, d] and "
            "[positions, layers, d]",
            code="unknown_layout",
        )
    row = tensor.reshape(-1)
    return on_blocks(single_row("tensor", row, options), path, "torch", options)


def read_refusal_direction(folder: Path) -> ControlVector:
    """The direction in a folder with `direction.pt` and `direction_metadata.json`.

    It was read at the input of a layer, so it lies on that layer's resid_pre.
    """
    held = load_tensors(folder / DIRECTION)
    if not isinstance(held, Tensor) or held.ndim != 1:
        raise FileFormatError(f"{DIRECTION} holds no single row [d]", code="unknown_layout")
    about = _metadata(folder / METADATA)
    layer, position = about.get("layer"), about.get("pos")
    if type(layer) is not int or layer < 0:
        raise FileFormatError(f"{METADATA} has the layer {str(layer)[:60]!r}, not a block's number")
    kept = {"position": position} if type(position) is int else {}
    rows = {layer: NamedRow("direction", _float(DIRECTION, held))}
    options = ImportOptions(source="refusal-direction")
    return on_blocks(rows, folder / DIRECTION, "torch", options, **kept)


def _by_layer(path: Path, held: dict[Any, Any], options: ImportOptions) -> ControlVector:
    rows: dict[int, NamedRow] = {}
    for key, value in held.items():
        match = _ROW.fullmatch(str(key))
        if match is None or not isinstance(value, Tensor):
            raise FileFormatError(
                "the file is not a control vector: its dictionary must hold a row for each layer "
                f"(0, 1, … or layer_0, …); it has {str(key)[:80]!r}",
                code="unknown_layout",
            )
        if int(match[1]) in rows:
            raise FileFormatError(
                f"the file has two tensors for layer {match[1]}", code="duplicate_layer"
            )
        row = _float(str(key), value)
        # Some writers keep a row as [1, d].
        row = row.reshape(-1) if row.ndim == 2 and len(row) == 1 else row
        rows[int(match[1])] = NamedRow(str(key), row)
    return placed(rows, path, "torch", options)


def _mean_differences(path: Path, tensor: Tensor, options: ImportOptions) -> ControlVector:
    if options.source != "refusal-direction":
        raise SteerError(
            f"the array of shape {list(tensor.shape)} looks like refusal_direction's mean_diffs.pt "
            "[positions, layers, d]: state 'from' refusal-direction and a 'position'",
            code="layer_offset_required",
            param="/from",
        )
    count = len(tensor)
    position = options.position
    if position is None or not -count <= position < count:
        raise SteerError(
            f"the file holds {count} positions: choose one with 'position' (-1 is the prompt's "
            f"last token); got {position!r}",
            code="invalid_option",
            param="/position",
        )
    rows = matrix_rows(f"mean_diffs[{position}]", tensor[position])
    # At a position whose token is the template's, all prompts agree before the first block.
    return placed(rows, path, "torch", options, zero_rows=True, position=position)


def _float(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        raise FileFormatError(
            f"the tensor {name[:80]!r} is of type {tensor.dtype} and shape {list(tensor.shape)}; a "
            "dense tensor of a float type is needed"
        )
    return tensor.detach()


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_METADATA_BYTES:
        raise FileFormatError(f"there is no {METADATA} of a sensible size beside {DIRECTION}")
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{METADATA} is not JSON: {str(error)[:200]}") from None
    if not isinstance(about, dict):
        raise FileFormatError(f"{METADATA} does not hold an object")
    return about
