"""Checks a GGUF file's header before the gguf package parses it.

That package believes what a file says of itself: a false array length makes it loop for hours, a
false tensor size makes it fail in ways of its own. This walk reads the same header, refuses
whatever reaches outside the file or beyond what its kind can need, and interprets nothing.
Layout: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from steer.errors import FileFormatError

MAX_KEYS = 1024
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
_F32 = GGMLQuantizationType.F32
_STRING, _ARRAY, _U32 = 8, 9, 4
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class GGUFBounds:
    """What a kind of GGUF file can need: bytes of header, tensors, elements of one array, and
    whether tensors may be quantised."""

    header_bytes: int
    tensors: int
    array: int
    quantised: bool


CONTROL_VECTOR = GGUFBounds(header_bytes=16 << 20, tensors=4096, array=4096, quantised=False)
MODEL = GGUFBounds(header_bytes=256 << 20, tensors=1 << 16, array=1 << 22, quantised=True)
"""A model's header holds its vocabulary."""


def check_gguf(path: Path, bounds: GGUFBounds = CONTROL_VECTOR) -> None:
    """Raises `FileFormatError` unless every length, count and offset in `path` is true."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        _Walk(stream, size, bounds).check()


class _Walk:
    def __init__(self, stream: BinaryIO, size: int, bounds: GGUFBounds) -> None:
        self._stream = stream
        self._size = size
        self._bounds = bounds
        self._offset = 0
        self._alignment = 32
        self._names: set[str] = set()

    def check(self) -> None:
        if self._read(4) != b"GGUF":
            raise FileFormatError("the file does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise FileFormatError(
                f"GGUF version {version} is not read (big-endian files are not, either): write "
                "the file as little-endian version 3"
            )
        tensors = self._count("<Q", self._bounds.tensors, "tensors")
        keys = self._count("<Q", MAX_KEYS, "keys")
        for _ in range(keys):
            self._key()
        self._names.clear()
        extents = [self._tensor() for _ in range(tensors)]
        start = math.ceil(self._offset / self._alignment) * self._alignment
        for name, offset, length in extents:
            if start + offset + length > self._size:
                raise FileFormatError(
                    f"the tensor {name!r} would end at byte {start + offset + length}, the file "
                    f"at {self._size}: it is truncated",
                    code="truncated_file",
                )

    def _key(self) -> None:
        key = self._new_name("key")
        kind = self._number("<I")
        if key == "general.alignment":
            self._alignment = self._aligned(kind)
        elif kind == _ARRAY:
            self._array(key)
        else:
            self._skip_value(key, kind)

    def _aligned(self, kind: int) -> int:
        value = self._number("<I") if kind == _U32 else 0
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise FileFormatError(f"general.alignment must be a power of two; got {value!r}")
        return value

    def _array(self, key: str) -> None:
        kind = self._number("<I")
        if kind == _ARRAY:
            raise FileFormatError(f"the key {key!r} is an array of arrays, which is not read")
        for _ in range(self._count("<Q", self._bounds.array, f"elements of {key!r}")):
            self._skip_value(key, kind)

    def _skip_value(self, key: str, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind in _SCALAR_BYTES:
            self._read(_SCALAR_BYTES[kind])
        else:
            raise FileFormatError(f"the key {key!r} has the unknown type {kind}")

    def _tensor(self) -> tuple[str, int, int]:
        name = self._new_name("tensor")
        dimensions = self._count("<I", MAX_DIMENSIONS, f"dimensions of {name!r}")
        shape = [self._number("<Q") for _ in range(dimensions)]
        kind = self._number("<I")
        offset = self._number("<Q")
        if not all(0 < length <= self._size for length in shape):
            raise FileFormatError(
                f"the tensor {name!r} has the shape {shape}, which the file cannot hold",
                code="truncated_file",
            )
        length = self._bytes(name, kind, shape)
        if offset % self._alignment:
            raise FileFormatError(f"the tensor {name!r} is not aligned to {self._alignment} bytes")
        return name, offset, length

    def _bytes(self, name: str, kind: int, shape: list[int]) -> int:
        """The length of a tensor of a ggml type."""
        if not self._bounds.quantised and kind != _F32:
            raise FileFormatError(
                f"the tensor {name!r} is of ggml type {kind}; a control vector holds F32 only"
            )
        if kind not in GGML_QUANT_SIZES:
            raise FileFormatError(f"the tensor {name!r} is of the unknown ggml type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return math.prod(shape) // block * size

    def _new_name(self, what: str) -> str:
        name = self._string()
        if name in self._names:
            raise FileFormatError(f"the {what} {name!r} occurs twice", code="duplicate_layer")
        self._names.add(name)
        return name

    def _string(self) -> str:
        raw = self._read(self._number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FileFormatError(f"{raw[:40]!r} is not UTF-8") from None

    def _count(self, form: str, limit: int, what: str) -> int:
        count = self._number(form)
        if count > limit:
            raise FileFormatError(f"the file declares {count} {what}; at most {limit} are read")
        return count

    def _number(self, form: str) -> int:
        value: int
        (value,) = struct.unpack(form, self._read(struct.calcsize(form)))
        return value

    def _read(self, count: int) -> bytes:
        end = self._offset + count
        if end > self._size:
            raise FileFormatError(
                f"the header reaches to byte {end}, the file ends at {self._size}: it is "
                "truncated, or lies about its lengths",
                code="truncated_file",
            )
        if end > self._bounds.header_bytes:
            raise FileFormatError(
                f"the header is larger than {self._bounds.header_bytes} bytes",
                code="header_too_large",
            )
        self._offset = end
        return self._stream.read(count)
