"""Control vectors in other tools' safetensors: a row per layer, one matrix, or one row."""

from __future__ import annotations

import re

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, matrix_rows, on_blocks, placed, single_row

_ROW = re.compile(r"(?:(?:layers?|directions?|blocks?)[._])?(\d{1,6})")


def read_vector(file: SafetensorsFile, options: ImportOptions) -> ControlVector:
    """The vector in `file`, its layers moved by `options.layer_offset`.

    Read are: keys that end in a layer number (`layers.3`, `direction.3`, `layer_3`, `3`); a single
    matrix [L, d], whose row k is block k unless the options say otherwise; and a single row [d],
    placed on `options.layers`.
    """
    numbered = {key: match for key in file.tensors if (match := _ROW.fullmatch(key))}
    if numbered and len(numbered) == len(file.tensors):
        rows = _numbered_rows(file, {key: int(match[1]) for key, match in numbered.items()})
        return placed(rows, file.path, "safetensors", options)
    if len(file.tensors) != 1:
        odd = sorted(set(file.tensors) - set(numbered))
        raise FileFormatError(
            "the file is not a control vector: its tensors must be named by layer (layers.0, "
            f"layers.1, …); got {', '.join(map(repr, odd[:5])) or 'none'}",
            code="unknown_layout",
        )
    (key, info), *_ = file.tensors.items()
    tensor = file.load([key])[key]
    if len(info.shape) == 2 and info.shape[0] > 1:
        rows = matrix_rows(key, tensor)
        if options.layer_offset is not None and options.layer_offset < 0:
            # What an offset puts before block 0 is the embeddings, as `hidden-states` says.
            first = -options.layer_offset
            rows = {place: row for place, row in rows.items() if place >= first}
        return placed(rows, file.path, "safetensors", options)
    row = tensor.reshape(-1) if len(info.shape) == 2 else tensor
    return on_blocks(single_row(key, row, options), file.path, "safetensors", options)


def _numbered_rows(file: SafetensorsFile, layers: dict[str, int]) -> dict[int, NamedRow]:
    rows: dict[int, NamedRow] = {}
    for key, row in file.load(layers).items():
        if layers[key] in rows:
            raise FileFormatError(
                f"the file has two tensors for layer {layers[key]}; one of them is {key!r}",
                code="duplicate_layer",
            )
        rows[layers[key]] = NamedRow(key, row)
    return rows
