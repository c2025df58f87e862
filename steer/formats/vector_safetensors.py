"""Control vectors in other tools' safetensors: a row per layer, one matrix, or one row."""

from __future__ import annotations

import re

from torch import Tensor

from steer.control_vector import ControlVector
from steer.errors import FileFormatError, SteerError
from steer.formats.options import ImportOptions
from steer.formats.placement import shift
from steer.formats.safetensors_file import SafetensorsFile

_ROW = re.compile(r"(?:(?:layers?|directions?|blocks?)[._])?(\d{1,6})")


def read_vector(file: SafetensorsFile, options: ImportOptions) -> ControlVector:
    """The vector in `file`, its layers moved by `options.layer_offset`.

    Read are: keys that end in a layer number (`layers.3`, `direction.3`, `layer_3`, `3`); a single
    matrix [L, d], whose row k is block k; and a single row [d], placed on `options.layers`.
    """
    offset = options.layer_offset or 0
    provenance = {"format": "safetensors", "layer_offset": offset}
    numbered = {key: match for key in file.tensors if (match := _ROW.fullmatch(key))}
    if numbered and len(numbered) == len(file.tensors):
        rows = _numbered_rows(file, {key: int(match[1]) for key, match in numbered.items()})
        return ControlVector.of(shift(rows, offset), provenance=provenance)
    if len(file.tensors) != 1:
        odd = sorted(set(file.tensors) - set(numbered))
        raise FileFormatError(
            "the file is not a control vector: its tensors must be named by layer (layers.0, "
            f"layers.1, …); got {', '.join(map(repr, odd[:5])) or 'none'}",
            code="unknown_layout",
        )
    (key, info), *_ = file.tensors.items()
    if len(info.shape) == 2 and info.shape[0] > 1:
        return ControlVector.of(_matrix_rows(file, key, offset), provenance=provenance)
    row = file.load([key])[key].reshape(-1) if len(info.shape) == 2 else file.load([key])[key]
    if options.layers is None:
        raise SteerError(
            f"the file holds a single direction, {key!r}, without a layer: say in 'layers' where "
            "it belongs",
            code="layer_required",
            param="/layers",
        )
    return ControlVector.of(dict.fromkeys(options.layers, row), provenance=provenance)


def _numbered_rows(file: SafetensorsFile, layers: dict[str, int]) -> dict[int, Tensor]:
    rows: dict[int, Tensor] = {}
    for key, row in file.load(layers).items():
        if layers[key] in rows:
            raise FileFormatError(
                f"the file has two tensors for layer {layers[key]}; one of them is {key!r}",
                code="duplicate_layer",
            )
        rows[layers[key]] = row
    return rows


def _matrix_rows(file: SafetensorsFile, key: str, offset: int) -> dict[int, Tensor]:
    matrix = file.load([key])[key]
    # Some tools count the embeddings as layer 0: with their offset of -1, that row is none of a
    # block's and is left out.
    first = max(0, -offset)
    return {place + offset: matrix[place] for place in range(first, len(matrix))}
