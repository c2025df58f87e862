"""Arrays that stay in their file: any rows of them are read when they are asked for.

A file is read by position, never mapped: a mapped page counts as memory of the process for as long
as the map lasts, and one pass over an SAE of 11 GB would fill the memory with them.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from steer.errors import FileFormatError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types that are read."""

_MOST_HEADER = 64 << 20
_MATRIX = 2


class ByteSource(Protocol):
    """Bytes by position."""

    @property
    def size(self) -> int: ...

    def read_into(self, target: memoryview, offset: int) -> int:
        """Fills `target` from `offset` on; how many bytes there were."""
        ...


class HeldBytes:
    """A file that is in memory already."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    @property
    def size(self) -> int:
        return len(self._data)

    def read_into(self, target: memoryview, offset: int) -> int:
        found = self._data[offset : offset + len(target)]
        target[: len(found)] = found
        return len(found)


class OpenedFile:
    """A file that stays open, and so readable, as long as an array in it is in use."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        weakref.finalize(self, os.close, descriptor)

    @staticmethod
    def at(path: Path) -> OpenedFile:
        """Raises `OSError`."""
        return OpenedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    @staticmethod
    def of(stream: IO[bytes]) -> OpenedFile:
        """The file under `stream`, which may be closed."""
        return OpenedFile(os.dup(stream.fileno()))

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, target: memoryview, offset: int) -> int:
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done


@dataclass(frozen=True, eq=False)
class FileArray:
    """An array in a file; `offset` is in bytes, `strides` are in elements.

    A matrix lies by rows or by columns: one of its strides is 1.
    """

    source: ByteSource
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def plain(
        source: ByteSource, dtype: torch.dtype, offset: int, shape: Sequence[int]
    ) -> FileArray:
        """An array without gaps, the last index running fastest."""
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        return FileArray(source, dtype, offset, tuple(shape), tuple(strides))

    @property
    def turned(self) -> FileArray:
        """The transpose of a matrix; nothing is read."""
        return FileArray(self.source, self.dtype, self.offset, self.shape[::-1], self.strides[::-1])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The whole array, in its own type."""
        if len(self.shape) == _MATRIX:
            return self.rows(0, self.shape[0])
        if 0 in self.shape:
            return torch.zeros(self.shape, dtype=self.dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self._read(self.offset, span).as_strided(self.shape, self.strides).contiguous()

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows `[stop − start, d]` of a matrix, in its own type."""
        count, width = stop - start, self.shape[1]
        down, along = self.strides
        if 0 in (count, width):
            return torch.zeros(count, width, dtype=self.dtype)
        size = self.dtype.itemsize
        if along == 1 or width == 1:
            flat = self._read(self.offset + start * down * size, (count - 1) * down + width)
            return flat.as_strided((count, width), (down, 1)).contiguous()
        if down != 1 and count > 1:
            raise FileFormatError(
                f"a matrix of the shape {list(self.shape)} lies in the file with the strides "
                f"{list(self.strides)}, neither by rows nor by columns: save it contiguous"
            )
        columns = bytearray(width * count * size)
        view = memoryview(columns)
        for place in range(width):
            part = view[place * count * size : (place + 1) * count * size]
            self._fill(part, self.offset + (place * along + start * down) * size)
        flat = torch.frombuffer(columns, dtype=self.dtype)
        return flat.view(width, count).T.contiguous()

    def take(self, rows: Sequence[int]) -> Tensor:
        """The rows `[K, d]` of a matrix, in its own type."""
        if not rows:
            return torch.zeros(0, self.shape[1], dtype=self.dtype)
        return torch.cat([self.rows(row, row + 1) for row in rows])

    def _read(self, offset: int, count: int) -> Tensor:
        data = bytearray(count * self.dtype.itemsize)
        self._fill(memoryview(data), offset)
        return torch.frombuffer(data, dtype=self.dtype)

    def _fill(self, target: memoryview, offset: int) -> None:
        if self.source.read_into(target, offset) != len(target):
            raise FileFormatError(
                f"the file ends inside an array of the shape {list(self.shape)}: it is truncated",
                code="truncated_file",
            )


def safetensors_arrays(source: ByteSource) -> tuple[dict[str, FileArray], dict[str, str]]:
    """The arrays in a safetensors file and its metadata, from its header alone.

    Raises `FileFormatError` unless the header is sound and its arrays cover the file exactly.
    """
    start = bytearray(8)
    header_bytes = -1
    if source.read_into(memoryview(start), 0) == len(start):
        header_bytes = int.from_bytes(start, "little")
    if not 0 <= header_bytes <= min(_MOST_HEADER, source.size - 8):
        raise FileFormatError(
            f"a file of {source.size} bytes cannot hold its header: it is truncated, or no "
            "safetensors file",
            code="truncated_file",
        )
    text = bytearray(header_bytes)
    source.read_into(memoryview(text), 8)
    try:
        header = json.loads(bytes(text), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        found = [(name, *_described(item)) for name, item in header.items()]
        plain = all(isinstance(one, str) for pair in metadata.items() for one in pair)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"the safetensors header is not valid: {error}") from error
    end = 0
    for name, dtype, shape, begin, stop in sorted(found, key=lambda one: one[3:5]):
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise FileFormatError(
                f"the safetensors header is not valid: {name!r} of the shape {list(shape)} is "
                f"said to lie from {begin} to {stop}"
            )
        end = stop
    if not plain or end != source.size - 8 - header_bytes:
        raise FileFormatError(
            f"the safetensors header describes {end} bytes, the file holds "
            f"{source.size - 8 - header_bytes}",
            code="truncated_file",
        )
    data = 8 + header_bytes
    arrays = {
        name: FileArray.plain(source, dtype, data + begin, shape)
        for name, dtype, shape, begin, _ in found
    }
    return arrays, metadata


def _described(item: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    (begin, stop), shape = item["data_offsets"], tuple(item["shape"])
    if any(type(number) is not int or number < 0 for number in (begin, stop, *shape)):
        raise ValueError("its numbers must be whole and not negative")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"the type {item['dtype']!r} is not read; read are {', '.join(DTYPES)}")
    return DTYPES[item["dtype"]], shape, begin, stop


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a key twice")
    return found
