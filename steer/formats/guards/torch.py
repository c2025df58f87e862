"""`.pt` files with tensors alone: checked first, then loaded by torch with `weights_only`.

torch believes the sizes that a file declares. So the zip's members and the pickle in it are read
here before, without calling anything: each storage must be as long as its member, each tensor must
lie inside its storage, and nothing but tensors, dictionaries and lists may occur.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile
from steer.errors import FileFormatError
from steer.formats.guards.pickle_machine import refused
from steer.formats.guards.pickled_tensors import (
    MAX_PICKLE_BYTES,
    Storage,
    StoredTensor,
    read_pickle,
    storage_id,
)
from steer.formats.guards.zip import UNREADABLE, data_offset, stored_members

_NUMBERS = ("version", ".format_version", ".storage_alignment", ".data/serialization_id")
_DEEPEST = 8
_LONGEST_NUMBER = 40  # the digits of .data/serialization_id
_BESIDE = ("byteorder", *_NUMBERS)
_TORCH_RAISES = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
)
"""What torch's reader may raise for a file that passes `check_torch_file` all the same."""


def load_tensors(path: Path) -> Any:
    """The tensor, or the dictionary or list of tensors and plain values, in a `.pt` file.

    Raises `FileFormatError`: `pickle_refused` for a file that holds more than that.
    """
    check_torch_file(path)
    try:
        # As an open file: by its name, torch would take a .safetensors for something else.
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except _TORCH_RAISES as error:
        raise FileFormatError(f"torch cannot load the file: {str(error)[:300]}") from error


def file_arrays(path: Path) -> Any:
    """What a `.pt` file holds, each tensor as an array that stays in the file."""
    held, members = _described(path)
    source = OpenedFile.at(path)

    def placed(value: Any, depth: int = 0) -> Any:
        if depth > _DEEPEST:
            raise FileFormatError(f"the file nests more than {_DEEPEST} deep")
        if isinstance(value, dict):
            return {key: placed(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [placed(one, depth + 1) for one in value]
        if not isinstance(value, StoredTensor):
            return value
        dtype = value.storage.dtype
        start = data_offset(source, members[value.storage.source])
        offset = start + value.offset * dtype.itemsize
        return FileArray(source, dtype, offset, value.shape, value.strides)

    return placed(held)


def check_torch_file(path: Path) -> None:
    """Raises `FileFormatError` unless `path` holds tensors alone and is true about their sizes."""
    _described(path)


def _described(path: Path) -> tuple[Any, dict[str, zipfile.ZipInfo]]:
    """What the file's pickle makes, checked, and the members of its storages by their key."""
    members = stored_members(path)
    folder = _folder(list(members))
    code = members[f"{folder}/data.pkl"]
    if code.file_size > MAX_PICKLE_BYTES:
        raise FileFormatError(f"the file's pickle has {code.file_size} bytes, far too many")
    try:
        with zipfile.ZipFile(path) as file:
            program = file.read(code)
            for name in _BESIDE:
                if (member := members.get(f"{folder}/{name}")) is not None:
                    _check_beside(name, file.open(member).read(_LONGEST_NUMBER + 1))
    except (*UNREADABLE, OSError) as error:
        raise FileFormatError(f"the file cannot be read: {error}") from error

    def storage(value: Any) -> Storage:
        dtype, key, count = storage_id(value)
        member = members.get(f"{folder}/data/{key}")
        held = -1 if member is None else member.file_size
        if count * dtype.itemsize != held:
            raise FileFormatError(
                f"the storage {key[:40]!r} declares {count * dtype.itemsize} bytes, the file "
                f"holds {max(held, 0)}",
                code="truncated_file",
            )
        return Storage(key, dtype, count)

    held = read_pickle(program, persistent=storage)
    data = f"{folder}/data/"
    return held, {
        name.removeprefix(data): one for name, one in members.items() if name.startswith(data)
    }


def _check_beside(name: str, content: bytes) -> None:
    if name == "byteorder" and content != b"little":
        raise FileFormatError("the file is big-endian, which is not read")
    digits = content.strip(b"\n")
    if name != "byteorder" and not (digits.isdigit() and len(digits) <= _LONGEST_NUMBER):
        raise FileFormatError(f"the member {name!r} is not a number, as torch.save writes")


def _folder(names: list[str]) -> str:
    """The one folder that everything lies in."""
    folder = names[0].split("/")[0] if names else ""
    for name in names:
        inner = name.removeprefix(f"{folder}/")
        plain = inner.startswith("data/") and "/" not in inner.removeprefix("data/")
        if not name.startswith(f"{folder}/") or not (
            inner == "data.pkl" or inner in _BESIDE or plain
        ):
            raise refused(f"has the member {name[:80]!r} (TorchScript programs are not read)")
    if f"{folder}/data.pkl" not in names:
        raise FileFormatError("the zip file has no data.pkl", code="unknown_layout")
    return folder
