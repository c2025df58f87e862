"""NumPy arrays inside pickles, rebuilt without NumPy's own functions being called.

For `pickled_tensors.read_pickle`, as further names: an array is made of a type, a shape and bytes
alone, of which the types are the plain floats and whole numbers and the bytes are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer.errors import FileFormatError
from steer.formats.guards.pickled_tensors import Call, refused

_TYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})
_ORDERS = {"<", "|", "="}
_MOST_DIMENSIONS = 8


@dataclass
class PickledType:
    """The type of an array's elements, which its state may give a byte order."""

    code: str
    order: str = "="

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), str(order), None, None, None, *_) if order in _ORDERS:
                self.order = order
            case _:
                raise refused("has an array of a compound or big-endian type")


@dataclass
class PickledArray:
    """An array, empty until its state comes."""

    array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), tuple(shape), PickledType() as kind, bool(by_column), bytes(data)):
                self.array = _array(shape, kind, data, by_column)
            case _:
                raise refused("has an array of objects, or one that NumPy does not write so")


def _array(shape: tuple[Any, ...], kind: PickledType, data: bytes, by_column: bool) -> np.ndarray:
    if len(shape) > _MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise FileFormatError(f"an array in the pickle has the shape {str(shape)[:80]}")
    dtype = np.dtype(kind.code)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise FileFormatError(
            f"an array in the pickle has the shape {list(shape)} and {len(data)} bytes",
            code="truncated_file",
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C").copy()


def _type(arguments: tuple[Any, ...]) -> PickledType:
    match arguments:
        case (str(code), *_) if code in _TYPES:
            return PickledType(code)
    raise refused(f"has an array of the type {str(arguments[:1])[:40]}")


def _empty(_: tuple[Any, ...]) -> PickledArray:
    return PickledArray()


def _from_buffer(arguments: tuple[Any, ...]) -> PickledArray:
    """As protocol 5 writes: bytes, type, shape and order."""
    match arguments:
        case (
            bytes() | bytearray() as data,
            PickledType() as kind,
            tuple(shape),
            ("C" | "F") as by,
        ):
            return PickledArray(_array(shape, kind, bytes(data), by == "F"))
    raise refused("makes an array in an unexpected way")


def _scalar(arguments: tuple[Any, ...]) -> int | float | bool:
    match arguments:
        case (PickledType() as kind, bytes(data)):
            number: int | float | bool = _array((), kind, data, False).item()
            return number
    raise refused("makes a number in an unexpected way")


def _class(_: tuple[Any, ...]) -> Any:
    raise refused("makes an array in an unexpected way")


NAMES: Mapping[str, Call] = {
    "numpy.dtype": _type,
    "numpy.ndarray": _class,
    **{
        f"{module}.{name}": call
        for module in ("numpy.core", "numpy._core")
        for name, call in (
            ("multiarray._reconstruct", _empty),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
"""What NumPy writes, by version 1 and by version 2, and what stands for it here."""
