"""An SAE's weights as a file holds them: matrices that stay in it, and small arrays.

Safetensors, `.npz` and `.pt` differ in where an array lies and agree in this. What is deflated in
an `.npz` is inflated into memory; everything else is read by position when its rows are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile, safetensors_arrays
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.errors import FileFormatError
from steer.formats.guards.json_objects import read_json_object
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.guards.torch import file_arrays
from steer.formats.vectors.npz import arrays_in_place

Held: TypeAlias = "FileArray | Tensor"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MATRIX = 2
_LONGEST_VECTOR = 1 << 26
_SHOWN = 12
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Weights:
    """The arrays of one file by name, and in `about` what a `.pt` holds beside them."""

    path: Path
    arrays: Mapping[str, Held]
    about: Mapping[str, Any]

    def require(self, needed: Iterable[str], *, optional: Iterable[str] = ()) -> None:
        """Raises `FileFormatError` unless the file has all that is `needed`, and no more than that
        and the `optional`: an array that nobody reads may change what the others mean."""
        wanted = set(needed)
        missing = sorted(wanted - set(self.arrays))
        more = sorted(set(self.arrays) - wanted - set(optional))
        if missing:
            raise FileFormatError(
                f"{self.path.name} lacks {', '.join(missing)}: it holds {self.names}",
                code="unknown_layout",
            )
        if more:
            raise FileFormatError(
                f"{self.path.name} holds {', '.join(map(repr, more[:5]))} beside what its layout "
                f"has ({', '.join(sorted(wanted))}): which is meant is not said; leave out the "
                "others",
                code="unknown_layout",
            )

    @property
    def names(self) -> str:
        """The names of the arrays, for messages."""
        return ", ".join(sorted(self.arrays)[:_SHOWN]) or "nothing"

    def rows(self, name: str) -> FeatureRows:
        """A matrix `[d_sae, d]`."""
        return FeatureRows(self._float(name, _MATRIX))

    def columns(self, name: str) -> FeatureRows:
        """A matrix that is stored `[d, d_sae]`."""
        array = self._float(name, _MATRIX)
        return FeatureRows(array.T if isinstance(array, Tensor) else array.turned)

    def vector(self, name: str, count: int | None = None) -> Tensor:
        """A row of numbers, or a single one, as float32; of `count` where that is given."""
        array = self._float(name, 1)
        if count is not None and list(array.shape) != [count]:
            raise FileFormatError(
                f"{name} has the shape {list(array.shape)}, and the decoder {count} features",
                code="mixed_widths",
            )
        return self._whole(name, array)

    def matrix(self, name: str) -> Tensor:
        """A whole matrix as float32, for those that do not grow with the number of features."""
        return self._whole(name, self._float(name, _MATRIX))

    def spread(self, name: str, count: int) -> Tensor:
        """A row of numbers; a single one is repeated `count` times."""
        found = self.vector(name)
        return found.reshape(()).repeat(count) if found.numel() == 1 else found

    def whole_number(self, name: str) -> int:
        """A single number, whatever type it has."""
        array = self.arrays[name]
        length = 1
        for one in array.shape:
            length *= one
        if length != 1:
            raise FileFormatError(f"{name} must be one number; its shape is {list(array.shape)}")
        return whole_number(name, _loaded(array).reshape(()).item())

    def _float(self, name: str, dimensions: int) -> Held:
        array = self.arrays[name]
        short = dimensions == 1 and len(array.shape) == 0
        if array.dtype not in _FLOATS or not (short or len(array.shape) == dimensions):
            raise FileFormatError(
                f"{name} is of type {array.dtype} and the shape {list(array.shape)}; floating "
                f"point and {dimensions} dimensions are needed"
            )
        return array

    def _whole(self, name: str, array: Held) -> Tensor:
        length = 1
        for one in array.shape:
            length *= one
        if length > _LONGEST_VECTOR:
            raise FileFormatError(f"{name} has {length} numbers, far too many")
        return _loaded(array).float()


def whole_number(name: str, value: Any) -> int:
    """`value`, where it is a whole number of at least 1; raises `FileFormatError`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FileFormatError(f"{name!r} must be a whole number from 1 on; got {value!r}")
    return value


def read_weights(path: Path, format: str) -> Weights:
    """The arrays in a `safetensors`, `npz` or `torch` file. Raises `FileFormatError`."""
    if format == "safetensors":
        SafetensorsFile.open(path)
        return Weights(path, safetensors_arrays(OpenedFile.at(path))[0], {})
    if format == "npz":
        return Weights(path, arrays_in_place(path), {})
    held = file_arrays(path)
    if not isinstance(held, dict):
        raise FileFormatError(
            f"{path.name} holds a {type(held).__name__}, not a dictionary of arrays",
            code="unknown_layout",
        )
    arrays = {str(name): one for name, one in held.items() if isinstance(one, FileArray)}
    about = {str(name): one for name, one in held.items() if not isinstance(one, FileArray)}
    return Weights(path, arrays, about)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object beside an SAE's weights."""
    if not path.is_file():
        raise FileFormatError(f"there is no {path.name} beside the weights", code="unknown_layout")
    return read_json_object(path, MAX_CONFIG_BYTES)


def _loaded(array: Held) -> Tensor:
    return array if isinstance(array, Tensor) else array.load()
