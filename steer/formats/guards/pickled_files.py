"""Pickles of tensors and arrays in any form, for `steer vectors convert` alone.

`torch.save` writes a zip with a pickle in it, `pickle.dump` the pickle itself, with each storage as
a `torch.save` of the old form inside, `numpy.save` of what is no array a pickle behind a header,
and joblib a pickle with arrays' numbers in its midst, all of
it compressed where that is asked for. The pickle is run by `pickle_machine`, which calls nothing;
the functions around CPU tensors and NumPy arrays that such files need are added to what it knows.
A server never comes here.
"""

from __future__ import annotations

import io
import pickletools
import struct
import tokenize
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch

from steer.errors import FileFormatError, TooLarge
from steer.formats.guards import pickled_arrays
from steer.formats.guards.compressed import read_plain
from steer.formats.guards.npy import NPY, read_header
from steer.formats.guards.pickle_machine import Instance, refused
from steer.formats.guards.pickled_arrays import PickledArray
from steer.formats.guards.pickled_tensors import (
    Storage,
    StoredTensor,
    read_pickle,
    read_pickle_from,
    storage_id,
)
from steer.formats.guards.stand_ins import check_present
from steer.formats.guards.zip import UNREADABLE, stored_members

MAX_BYTES = 256 << 20
_MAX_DEPTH = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
Read: TypeAlias = Callable[[Storage], bytes | memoryview]


def load_pickle(path: Path) -> Any:
    """What `pickle.dump`, `joblib.dump` or `torch.save` wrote to `path`: its tensors and arrays as
    tensors, arrays of texts and of objects as lists, instances of whatever class as `Instance`.

    Raises `FileFormatError` (`pickle_refused` for whatever else is in the file, by name), or
    `TooLarge`.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TooLarge(f"the file has {size} bytes; at most {MAX_BYTES} are converted")
    check_present(path)
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        found, read = _zipped(path)
    else:
        found, read = _plain(_without_header(read_plain(path, MAX_BYTES)))
    held = _Materialised(read).of(found)
    # What numpy.save makes of an object that is no array.
    alone = isinstance(found, PickledArray) and isinstance(held, list) and len(held) == 1
    return held[0] if alone else held


def _without_header(data: bytes) -> bytes:
    """The pickle in what `numpy.save` wrote of objects; any other file as it is."""
    if not data.startswith(NPY):
        return data
    stream = io.BytesIO(data)
    try:
        *_, dtype = read_header("array", stream)
    except (*UNREADABLE, SyntaxError, tokenize.TokenError) as error:
        raise FileFormatError(f"the .npy file cannot be read: {str(error)[:300]}") from error
    if not dtype.hasobject:
        raise FileFormatError(
            "the .npy file is no pickle: it is imported as it is (`steer vectors import`)",
            code="invalid_option",
        )
    return data[stream.tell() :]


class _Materialised:
    """Copies of pickled objects with tensors in the place of what stands for them.

    Guarantees: each object is copied once, however often it occurs.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._known: dict[int, Any] = {}

    def of(self, value: Any, depth: int = _MAX_DEPTH) -> Any:
        if depth == 0:
            raise FileFormatError(f"the file nests more than {_MAX_DEPTH} deep")
        if id(value) not in self._known:
            self._known[id(value)] = self._copied(value, depth - 1)
        return self._known[id(value)]

    def _copied(self, value: Any, depth: int) -> Any:
        if isinstance(value, StoredTensor):
            return value.read(self._read(value.storage))
        if isinstance(value, PickledArray):
            if value.array is None:
                raise FileFormatError("an array in the pickle has no numbers")
            if isinstance(value.array, list):
                return self.of(value.array, depth)
            if value.array.dtype.kind in "US":
                return value.array.tolist()
            return torch.from_numpy(value.array)
        if isinstance(value, Instance):
            return Instance(value.kind, self.of(value.state, depth))
        if isinstance(value, dict):
            return {key: self.of(one, depth) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.of(one, depth) for one in value)
        return value


def _zipped(path: Path) -> tuple[Any, Read]:
    """As torch.save writes: the pickle and each storage are members of a zip that only stores."""
    members = stored_members(path)
    programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise FileFormatError("the zip file has not one data.pkl", code="unknown_layout")
    folder = programs[0].removesuffix("/data.pkl")

    def storage(value: Any) -> Storage:
        dtype, key, count = storage_id(value)
        member = members.get(f"{folder}/data/{key}")
        if member is None or member.file_size != count * dtype.itemsize:
            raise _false_length(key)
        return Storage(member.filename, dtype, count)

    def read(storage: Storage) -> bytes:
        return _member(path, storage.source)

    return _program(_member(path, programs[0]), storage), read


def _member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as file:
            return file.read(name)
    except (*UNREADABLE, OSError) as error:
        raise FileFormatError(f"the file cannot be read: {error}") from error


def _plain(data: bytes) -> tuple[Any, Read]:
    """As pickle.dump writes: each storage is a torch.save of the old form, inside the pickle."""

    def no_ids(_: Any) -> Storage:
        raise refused("refers to something outside of it")

    return _program(data, no_ids), lambda storage: storage.source


def _program(data: bytes, persistent: Callable[[Any], Storage]) -> Any:
    # Protocol 2 has no bytes: it writes them as a text and the call that encodes it.
    calls = {
        "torch.storage._load_from_bytes": _storage_from_bytes,
        "_codecs.encode": _encoded,
        "__builtin__.bytes": _no_bytes,
    }
    names = {**pickled_arrays.NAMES, **calls}

    def inner(stream: BinaryIO) -> Any:
        return read_pickle_from(stream, persistent=persistent, names=names, instances=True)

    return read_pickle(
        data,
        persistent=persistent,
        names={**names, **pickled_arrays.followed(inner)},
        instances=True,
        limit=MAX_BYTES,
    )


def _encoded(arguments: tuple[Any, ...]) -> bytes:
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1")
    raise refused("encodes what is no text in latin1")


def _no_bytes(arguments: tuple[Any, ...]) -> bytes:
    if arguments:
        raise refused("makes bytes of something")
    return b""


def _storage_from_bytes(arguments: tuple[Any, ...]) -> Storage:
    """The storage in torch.save's old form: five pickles, then a count and the numbers."""
    match arguments:
        case (bytes(data),):
            pass
        case _:
            raise refused("loads a storage from what is no bytes")
    stream, parts, kept = io.BytesIO(data), [], []

    def storage(value: Any) -> Storage:
        dtype, key, count = storage_id(value)
        kept.append(Storage(key, dtype, count))
        return kept[-1]

    for _ in range(_LEGACY_PICKLES):
        start = stream.tell()
        try:
            for _opcode in pickletools.genops(stream):
                pass
        except (ValueError, IndexError) as error:
            raise FileFormatError(f"a storage in the pickle is damaged: {error}") from error
        parts.append(read_pickle(data[start : stream.tell()], persistent=storage))
    magic, _version, about, found, keys = parts
    if magic != _LEGACY_MAGIC or about.get("little_endian") is not True:
        raise FileFormatError("a storage in the pickle is not as torch.save writes, or big-endian")
    if not isinstance(found, Storage) or keys != [found.source]:
        raise FileFormatError("a storage in the pickle is not alone in its place")
    numbers = memoryview(data)[stream.tell() :]
    if len(numbers) < 8 or struct.unpack("<q", numbers[:8]) != (found.count,):
        raise _false_length(found.source)
    if len(numbers) - 8 != found.count * found.dtype.itemsize:
        raise _false_length(found.source)
    return Storage(numbers[8:], found.dtype, found.count)


def _false_length(key: str) -> FileFormatError:
    return FileFormatError(
        f"the storage {key[:40]!r} is not as long as the file says", code="truncated_file"
    )
