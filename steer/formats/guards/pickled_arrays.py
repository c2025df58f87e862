"""NumPy arrays inside pickles, rebuilt without NumPy's own functions being called.

For `pickled_tensors.read_pickle`, as further names: an array is made of a type, a shape and bytes
alone, of which the types are the plain numbers and texts and the bytes are counted; or of objects,
which are a list in the pickle. joblib writes an array's bytes behind its description instead, in
the midst of the pickle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from steer.errors import FileFormatError
from steer.formats.guards.pickle_machine import Call, refused

_TYPES = re.compile(r"f[248]|[iu][1248]|b1|[US][1-9]\d{0,5}")
_OBJECTS = re.compile(r"O\d*")
_ORDERS = {"<", "|", "="}
_MOST_DIMENSIONS = 8


@dataclass
class PickledType:
    """The type of an array's elements, which its state may give a byte order."""

    code: str
    order: str = "="

    @property
    def dtype(self) -> np.dtype:
        if self.of_objects:
            raise refused("has objects where numbers were to be")
        return np.dtype(self.code)

    @property
    def of_objects(self) -> bool:
        return self.code.startswith("O")

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), str(order), None, None, None, *_) if order in _ORDERS:
                self.order = order
            case _:
                raise refused("has an array of a compound or big-endian type")


@dataclass
class PickledArray:
    """An array, empty until its state comes; of objects, in one list whatever the shape."""

    array: np.ndarray | list[Any] | None = None

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), tuple(), PickledType(of_objects=True), bool(), list(objects)):
                self.array = objects
            case (int(), tuple(shape), PickledType() as kind, bool(by_column), bytes(data)):
                self.array = _array(shape, kind, data, by_column)
            case _:
                raise refused("has an array that NumPy does not write so")


@dataclass
class FollowedArray(PickledArray):
    """An array of joblib's: a description, and behind it in the file a byte that counts those to be
    passed over, if the description speaks of alignment, and the numbers; of objects, a pickle.

    `read_pickle` reads the next pickle of a stream.
    """

    read_pickle: Callable[[BinaryIO], Any] | None = None
    state: Mapping[Any, Any] | None = None

    def set_state(self, state: Any) -> None:
        match state:
            case {"shape": tuple(), "order": "C" | "F", "dtype": PickledType()}:
                self.state = state
            case _:
                raise refused("has an array that joblib does not write so")

    def read_on(self, stream: BinaryIO) -> None:
        assert self.state is not None
        assert self.read_pickle is not None
        shape, kind = self.state["shape"], self.state["dtype"]
        if kind.of_objects:
            inner = self.read_pickle(stream)
            if not isinstance(inner, PickledArray):
                raise refused("has an array that joblib does not write so")
            self.array = inner.array
            return
        if self.state.get("numpy_array_alignment_bytes") is not None:
            stream.read(*stream.read(1))
        data = stream.read(_bytes_of(shape, kind))
        self.array = _array(shape, kind, data, self.state["order"] == "F")


def _bytes_of(shape: tuple[Any, ...], kind: PickledType) -> int:
    if len(shape) > _MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise FileFormatError(f"an array in the pickle has the shape {str(shape)[:80]}")
    return int(math.prod(shape)) * kind.dtype.itemsize


def _array(shape: tuple[Any, ...], kind: PickledType, data: bytes, by_column: bool) -> np.ndarray:
    if _bytes_of(shape, kind) != len(data):
        raise FileFormatError(
            f"an array in the pickle has the shape {list(shape)} and {len(data)} bytes",
            code="truncated_file",
        )
    return np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_column else "C").copy()


def _type(arguments: tuple[Any, ...]) -> PickledType:
    match arguments:
        case (str(code), *_) if _TYPES.fullmatch(code) or _OBJECTS.fullmatch(code):
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


def _scalar(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (PickledType() as kind, bytes(data)):
            return _array((), kind, data, False).item()
    raise refused("makes a number in an unexpected way")


def followed(read_pickle: Callable[[BinaryIO], Any]) -> Mapping[str, Call]:
    """What joblib writes in the place of an array; `read_pickle` is for those of objects."""
    return {"joblib.numpy_pickle.NumpyArrayWrapper": lambda _: FollowedArray(None, read_pickle)}


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
