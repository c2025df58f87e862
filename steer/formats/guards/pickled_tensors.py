"""Tensors inside pickles, as torch.save describes them.

A fixed set of names is known; each stands for a function of this module or of the caller.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from steer.errors import FileFormatError
from steer.formats.guards.pickle_machine import Call, Instance, Name, PickleMachine, refused

MAX_PICKLE_BYTES = 256 << 10
_MAX_DEPTH = 64
_CONVERT = (
    "; or make safetensors of it by `steer vectors convert` on your own machine, which reads NumPy "
    "arrays, modules of torch and classifiers of scikit-learn, and runs nothing"
)

DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    # Of no use as rows, and of none to an attacker: readers refuse or heed them by name.
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Storage:
    """A run of numbers that tensors are views of; `source` is how the caller finds its bytes."""

    source: Any
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, checked to lie inside it and to be no larger than it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, data: bytes | memoryview) -> Tensor:
        """A float32 copy of the tensor; `data` holds the storage's bytes."""
        own = bytearray(data)  # torch warns of bytes that it must not write to
        flat = torch.frombuffer(own, dtype=self.storage.dtype, count=self.storage.count)
        view = flat.as_strided(self.shape, self.strides, self.offset)
        return view.to(torch.float32, copy=True).contiguous()


def _unread(name: str) -> FileFormatError:
    """The error for a name that is not known: some are harmless, and have a way of their own."""
    if name == "torch._utils._rebuild_tensor_v3":
        return FileFormatError(
            "the file has a tensor of a type that is not read (float8, unsigned 16 bits and wider):"
            " save it as float32 (tensor.float())"
        )
    return refused(f"names {name[:120]!r}", _CONVERT)


def read_pickle(
    data: bytes,
    *,
    persistent: Callable[[Any], Any],
    names: Mapping[str, Call] | None = None,
    instances: bool = False,
    limit: int = MAX_PICKLE_BYTES,
) -> Any:
    """The object pickled in `data`; tensors come as `StoredTensor`, parameters as their tensors.

    `persistent` turns a persistent id into a `Storage`. `names` are further functions that may be
    called; with `instances`, any other name stands for a class, and gives an `Instance`. Objects
    made here take up to about 70 times the pickle's length, so that is limited. Raises
    `FileFormatError`.
    """
    if len(data) > limit:
        raise FileFormatError(f"the pickle has {len(data)} bytes; at most {limit} are read")
    return read_pickle_from(
        io.BytesIO(data), persistent=persistent, names=names or {}, instances=instances
    )


def read_pickle_from(
    stream: BinaryIO,
    *,
    persistent: Callable[[Any], Any],
    names: Mapping[str, Call],
    instances: bool,
) -> Any:
    """`read_pickle` of the next pickle in a stream of bounded length, which is left behind it."""
    known = {name: Name(name, call) for name, call in {**_CALLS, **names}.items()}
    known |= {f"torch.{name}": Name(name, _not_callable(name)) for name in DTYPES}

    def named(text: str) -> Name:
        if text in known:
            return known[text]
        if instances:
            return Name(text, lambda _: Instance(text))
        raise _unread(text)

    return PickleMachine(named, persistent, stream).run()


def storage_id(value: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and length of the storage that a persistent id of torch.save names."""
    match value:
        case ("storage", Name(text=name), str(key), str(), int(count), *_) if name in DTYPES:
            if count < 0:
                raise FileFormatError(f"a storage declares {count} numbers")
            return DTYPES[name], key, count
        case ("storage", Name(text=name), *_):
            raise refused(f"holds a {name}; read are {', '.join(DTYPES)}")
    raise refused("refers to something outside that is no storage")


def stored_tensors(value: Any, *, depth: int = _MAX_DEPTH) -> list[StoredTensor]:
    """All tensors in nested dictionaries and lists, each at its first place."""
    found: dict[int, StoredTensor] = {}
    waiting = [(value, depth)]
    seen: set[int] = set()
    while waiting:
        one, left = waiting.pop()
        if isinstance(one, StoredTensor):
            found[id(one)] = one
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            if left == 0:
                raise FileFormatError(f"the file nests more than {depth} deep")
            inner = one.values() if isinstance(one, dict) else one
            waiting.extend((item, left - 1) for item in inner)
    return list(found.values())


def _rebuilt_tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    if not 6 <= len(arguments) <= 7:
        raise FileFormatError(f"a tensor in the file is made of {len(arguments)} parts")
    storage, offset, shape, strides, *_ = arguments
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise FileFormatError("a tensor in the file is not described as torch.save describes them")
    if len(shape) != len(strides) or len(shape) > 8:
        raise FileFormatError(f"a tensor has the shape {list(shape)} but {len(strides)} strides")
    size, last = 1, offset
    for length, stride in zip(shape, strides, strict=True):
        size *= length
        last += (length - 1) * stride
    # A stride of 0 would make a view of any size from one number.
    if size > storage.count or (size and last >= storage.count):
        raise FileFormatError(
            f"a tensor of the shape {list(shape)} does not fit its storage of {storage.count} "
            "numbers",
            code="truncated_file",
        )
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not arguments or not isinstance(arguments[0], StoredTensor):
        raise FileFormatError("a parameter in the file is no tensor")
    return arguments[0]


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise refused("makes an OrderedDict from something")
    return {}


def _not_callable(name: str) -> Call:
    def call(_: tuple[Any, ...]) -> Any:
        raise refused(f"calls {name}")

    return call


_CALLS: Mapping[str, Call] = {
    "torch._utils._rebuild_tensor_v2": _rebuilt_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
}
