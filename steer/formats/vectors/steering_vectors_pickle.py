"""Pickled vectors of the steering-vectors package, for `steer vectors convert` alone.

`pickle.dump(vector)` and `torch.save(vector)` both write the dataclass by its name. The pickle is
read by `steer.formats.guards.pickled_tensors`, which calls nothing; here the one class and the
functions around CPU tensors that such a file needs are added to what it knows. A server never comes
here.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, TooLarge, Unsupported
from steer.formats.guards.pickled_tensors import (
    Instance,
    Storage,
    StoredTensor,
    read_pickle,
    refused,
    storage_id,
)
from steer.formats.guards.zip import UNREADABLE, stored_members
from steer.formats.placement import NamedRow, origin
from steer.spec import Site

MAX_BYTES = 256 << 20
_CLASS = "steering_vectors.steering_vector.SteeringVector"
_SITES: dict[str, Site] = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
Read: TypeAlias = Callable[[Storage], bytes | memoryview]


def read_steering_vector(path: Path) -> ControlVector:
    """The vector in a file that `pickle.dump` or `torch.save` made of a SteeringVector.

    Its layers are 0-based already. Raises `FileFormatError` (`pickle_refused` for whatever else is
    in the file, by name), or `Unsupported` for vectors that act on a norm's output.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TooLarge(f"the file has {size} bytes; at most {MAX_BYTES} are converted")
    with path.open("rb") as stream:
        start = stream.read(4)
    found, read = _zipped(path) if start == b"PK\x03\x04" else _plain(path.read_bytes())
    if not isinstance(found, Instance) or set(found.state) != {"layer_activations", "layer_type"}:
        raise FileFormatError(
            "the file holds no SteeringVector of the steering-vectors package: a .pt file with "
            "tensors alone can be uploaded as it is",
            code="unknown_layout",
        )
    site = _site(found.state["layer_type"])
    rows = _rows(found.state["layer_activations"], read)
    tool = origin(path, "pickle", 0, rows, "steering-vectors")
    return ControlVector.of(
        {layer: named.row for layer, named in rows.items()}, site=site, provenance=tool
    )


def _site(layer_type: Any) -> Site:
    if layer_type in _NORMS:
        raise Unsupported(
            f"the vector acts on the output of {layer_type}, inside the block and scaled by the "
            "norm's weights, where Steer has no site: train it with layer_type='decoder_block' "
            "(or 'self_attn', 'mlp')",
            code="unsupported_site",
        )
    if not isinstance(layer_type, str) or layer_type not in _SITES:
        raise FileFormatError(f"the vector's layer_type {str(layer_type)[:60]!r} is not known")
    return _SITES[layer_type]


def _rows(activations: Any, read: Read) -> dict[int, NamedRow]:
    rows: dict[int, NamedRow] = {}
    for layer, tensor in activations.items() if isinstance(activations, dict) else ():
        if type(layer) is not int or layer < 0 or not isinstance(tensor, StoredTensor):
            raise FileFormatError("layer_activations does not map layers to tensors")
        row: Tensor = tensor.read(read(tensor.storage))
        rows[layer] = NamedRow(str(layer), row)
    return rows


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
    calls = {"torch.storage._load_from_bytes": _storage_from_bytes, "_codecs.encode": _encoded}
    return read_pickle(
        data, persistent=persistent, names=calls, classes=frozenset({_CLASS}), limit=MAX_BYTES
    )


def _encoded(arguments: tuple[Any, ...]) -> bytes:
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1")
    raise refused("encodes what is no text in latin1")


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
