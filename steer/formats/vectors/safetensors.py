"""Control vectors in other tools' safetensors: a row per layer, one matrix, or one row."""

from __future__ import annotations

from steer.artefacts.control_vector import ControlVector
from steer.formats.arrays import vector_of_arrays
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions


def read_vector(file: SafetensorsFile, options: ImportOptions) -> ControlVector:
    """The vector in `file`, its layers moved by `options.layer_offset`.

    A single matrix [L, d] has block k in its row k unless the options say otherwise, and a single
    row [d] belongs at the output of the blocks `options.layers`.
    """
    return vector_of_arrays(
        file.tensors,
        lambda: file.load(file.tensors),
        file.path,
        "safetensors",
        options,
        about=file.metadata,
        asks=False,
    )
