"""Control vectors in `.pt` files: persona vectors, refusal directions, and dictionaries.

- a dictionary of rows by layer (`3`, `"layer_3"`, `"model.layers.3"`, …), also inside another one;
- an array [L, d], about which the sender must say what its row 0 is: `from` persona-vectors
  (`{trait}_response_avg_diff.pt`, [L+1, d]: row k is `hidden_states[k]`) or blocks;
- an array [pos, L, d], `mean_diffs.pt` of refusal_direction (2406.11717): means of the *inputs* of
  layers at the last positions of the prompt, of which the sender chooses one;
- a list of rows [d], which is an array [L, d] in pieces;
- one row [d], whose layer and side of it the sender or a `direction_metadata.json` beside it says;
- the files of assistant-axis (2601.10387): `axis.pt`, those of roles, and capping configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, SteerError
from steer.formats.arrays import MOST_WRAPPERS, as_row, layer_beside, vector_of_arrays
from steer.formats.claims import check_claims, unhonoured
from steer.formats.guards.json_objects import read_json_object
from steer.formats.guards.torch import load_tensors
from steer.formats.options import ImportOptions
from steer.formats.placement import matrix_rows, placed, single_row
from steer.formats.vectors.assistant_axis import (
    is_capping,
    measured_rows,
    read_capping,
)

DIRECTION, METADATA = "direction.pt", "direction_metadata.json"
MAX_METADATA_BYTES = 1 << 20
_MEAN_DIFFERENCES = 3


def vector_of_held(held: Any, path: Path, options: ImportOptions) -> ControlVector:
    """The vector in what a `.pt` file held. Raises `FileFormatError` or `SteerError`."""
    if isinstance(held, dict):
        return _of_dictionary(held, path, options)
    held = _plain(held)
    if not isinstance(held, Tensor):
        raise FileFormatError(
            f"the file holds a {type(held).__name__}: a control vector is a tensor, a list of rows "
            "of one length, or a dictionary of rows by layer",
            code="unknown_layout",
        )
    return _of_tensor("tensor", held, path, options)


def _of_tensor(
    name: str,
    held: Tensor,
    path: Path,
    options: ImportOptions,
    *,
    about: Mapping[str, Any] | None = None,
    layer: int | None = None,
) -> ControlVector:
    tensor = _float(name, held)
    several = tensor.ndim == _MEAN_DIFFERENCES and 1 not in tensor.shape[:2]
    if several or (tensor.ndim == _MEAN_DIFFERENCES and options.source == "refusal-direction"):
        check_claims(about or {}, options)
        return _mean_differences(path, tensor, options)
    if options.source == "refusal-direction" and tensor.ndim > 1 and len(tensor) > 1:
        raise FileFormatError(
            f"mean_diffs.pt has three dimensions; this array has the shape {list(tensor.shape)}"
        )
    return vector_of_arrays(
        [name], lambda: {name: tensor}, path, "torch", options, about=about or {}, layer=layer
    )


def read_refusal_direction(folder: Path, options: ImportOptions) -> ControlVector:
    """The direction in a folder with `direction.pt` and `direction_metadata.json`.

    It was read at the input of a layer, so it lies on that layer's resid_pre.
    """
    held = load_tensors(folder / DIRECTION)
    if not isinstance(held, Tensor) or held.ndim != 1:
        raise FileFormatError(f"{DIRECTION} holds no single row [d]", code="unknown_layout")
    about = _metadata(folder / METADATA)
    layer, position = about.pop("layer", None), about.pop("pos", None)
    if type(layer) is not int or layer < 0:
        raise FileFormatError(f"{METADATA} has the layer {str(layer)[:60]!r}, not a block's number")
    check_claims(about, options)
    vector = single_row(
        "direction",
        _float(DIRECTION, held),
        folder / DIRECTION,
        "torch",
        ImportOptions(source="refusal-direction"),
        layer=layer,
    )
    kept = {"position": position} if type(position) is int else {}
    provenance = vector.card.provenance | kept
    card = vector.card.model_copy(update={"provenance": provenance})
    return ControlVector(vector.directions, card)


def _of_dictionary(
    held: Mapping[Any, Any], path: Path, options: ImportOptions, wrappers: int = MOST_WRAPPERS
) -> ControlVector:
    if is_capping(held):
        return read_capping(held, path, options)
    if (axis := measured_rows(held)) is not None:
        beside = {str(key): one for key, one in held.items() if not isinstance(one, Tensor)}
        check_claims(beside, options)
        return placed(
            matrix_rows(axis, _float(axis, held[axis])),
            path,
            "torch",
            options,
            tool="assistant-axis",
        )
    named = {str(key): _plain(value) for key, value in held.items()}
    if len(named) != len(held):
        raise FileFormatError("the file has two tensors for a layer", code="duplicate_layer")
    arrays = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    inner = {name: value for name, value in named.items() if isinstance(value, dict)}
    about = {name: value for name, value in named.items() if name not in {*arrays, *inner}}
    if not arrays and len(inner) == 1 and wrappers:
        # As under "state_dict" or "directions".
        (rows,) = inner.values()
        if not any(str(key) in about for key in rows):
            return _of_dictionary({**rows, **about}, path, options, wrappers - 1)
    _check_beside(arrays, inner, about)
    layer = layer_beside(about)
    if len(arrays) == 1:
        ((name, tensor),) = arrays.items()
        if not name.isdigit():
            return _of_tensor(name, tensor, path, options, about=about, layer=layer)
    return vector_of_arrays(
        arrays,
        lambda: {name: _float(name, tensor) for name, tensor in arrays.items()},
        path,
        "torch",
        options,
        about=about,
    )


def _check_beside(
    arrays: Mapping[str, Tensor], inner: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Raises for what a dictionary holds beside rows that has a reader of its own, or none."""
    if {"rotate_layer", "bias"} <= set(arrays) or set(arrays) == {"bias"}:
        raise FileFormatError(
            "the file holds one layer of a pyreft adapter, and its name and config.json say which "
            "and of what kind: send the folder, as .zip, .tar or .tar.gz",
            code="unknown_layout",
        )
    if inner and arrays:
        raise FileFormatError(
            f"the file's dictionary holds rows and further dictionaries, {next(iter(inner))[:80]!r}"
            ": send the rows of one vector alone",
            code="unknown_layout",
        )
    if not arrays:
        held = ", ".join(repr(key[:80]) for key in [*inner, *about][:5])
        raise FileFormatError(
            "the file is not a control vector: its dictionary must hold a row for each layer "
            f"(0, 1, … or layer_0, …); it has {held or 'nothing'}",
            code="unknown_layout",
        )
    for key in ("layers", "layer_indices", "layer_ids"):
        if key in about:
            raise unhonoured(
                key,
                about[key],
                "which rows that are not named by layer may follow or not",
                "name each row by its layer",
            )


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


def _plain(value: Any) -> Any:
    """The number of a tensor without dimensions, which is said beside rows and is no row; and the
    array that rows in a list are."""
    if isinstance(value, list | tuple) and all(isinstance(one, Tensor) for one in value):
        rows = [as_row(one) for one in value]
        alike = {(row.shape, row.dtype) for row in rows}
        return torch.stack(rows) if len(alike) == 1 and rows[0].ndim == 1 else value
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


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
    return read_json_object(path, MAX_METADATA_BYTES)
