"""Reads what tensors are pickled as, without ever calling what a pickle names.

A pickle is a program for a small stack machine. This module runs that machine itself, over the few
instructions that dictionaries, lists, numbers, texts and tensors need, and knows a fixed set of
names; each stands for a function of this module or of the caller. Any other instruction or name is
refused by name, so nothing that a file says is ever imported or called. Keys are texts and whole
numbers, which also rules out the nested tuples that take for ever to hash.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from steer.errors import FileFormatError

MAX_PICKLE_BYTES = 256 << 10
_MAX_DEPTH = 64

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
Call: TypeAlias = Callable[[tuple[Any, ...]], Any]


class _Mark:
    """Where the elements of a tuple, list or dictionary begin."""


@dataclass(frozen=True)
class Name:
    """A name in a pickle that this module knows; `call` is what stands for it."""

    text: str
    call: Call


@dataclass
class Instance:
    """An object of a class that the caller expects, with the state its pickle gives it."""

    kind: str
    state: dict[Any, Any] = field(default_factory=dict)


@runtime_checkable
class Stateful(Protocol):
    """An object, made by a name of the caller's, that its pickle gives a state."""

    def set_state(self, state: Any) -> None:
        """Raises `FileFormatError` for a state that it cannot have."""


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


def refused(what: str) -> FileFormatError:
    """The error for a pickle that names or does more than tensors need."""
    return FileFormatError(
        f"the file is a pickle that holds more than tensors: it {what}. Opening such a file can "
        "run code, so it is never read here: save its tensors alone (torch.save of a dictionary "
        "of tensors, or safetensors.torch.save_file)",
        code="pickle_refused",
    )


def _unread(name: str) -> FileFormatError:
    """The error for a name that is not known: some are harmless, and have a way of their own."""
    if name == "torch._utils._rebuild_tensor_v3":
        return FileFormatError(
            "the file has a tensor of a type that is not read (float8, unsigned 16 bits and wider):"
            " save it as float32 (tensor.float())"
        )
    if name.startswith("numpy."):
        return FileFormatError(
            "the file is a pickle with NumPy arrays, which are not read as they are: `steer vectors"
            " convert` on your own machine makes safetensors of them, or save them as tensors "
            "(torch.from_numpy) or with numpy.savez",
            code="pickle_refused",
        )
    return refused(f"names {name[:120]!r}")


def read_pickle(
    data: bytes,
    *,
    persistent: Callable[[Any], Any],
    names: Mapping[str, Call] | None = None,
    classes: frozenset[str] = frozenset(),
    limit: int = MAX_PICKLE_BYTES,
) -> Any:
    """The object pickled in `data`; tensors come as `StoredTensor`, parameters as their tensors.

    `persistent` turns a persistent id into a `Storage`. `names` are further functions that may be
    called, and `classes` classes of which instances may be made, as `Instance`. Objects made here
    take up to about 70 times the pickle's length, so that is limited. Raises `FileFormatError`.
    """
    if len(data) > limit:
        raise FileFormatError(f"the pickle has {len(data)} bytes; at most {limit} are read")
    known = {name: Name(name, call) for name, call in {**_CALLS, **(names or {})}.items()}
    known |= {name: Name(name, _maker(name)) for name in classes}
    known |= {f"torch.{name}": Name(name, _not_callable(name)) for name in DTYPES}
    machine = _Machine(known, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if machine.step(opcode.name, argument):
                break
    except FileFormatError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise FileFormatError(f"the pickle is damaged: {error}") from error
    return machine.result


class _Machine:
    """The stack machine.

    Guarantees: a step takes time and memory that the pickle's own length bounds.
    """

    def __init__(self, known: Mapping[str, Name], persistent: Callable[[Any], Any]) -> None:
        self._known, self._persistent = known, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, opcode: str, argument: Any) -> bool:
        """Runs one instruction; whether it was the last."""
        if opcode == "STOP":
            self.result = self._stack.pop()
            return True
        if opcode in _PUSHED:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _MEMO:
            self._remember(opcode, argument)
        elif opcode in _TUPLES:
            self._tuple(_TUPLES[opcode])
        elif opcode in _FILLS:
            self._fill(opcode)
        elif opcode not in ("PROTO", "FRAME"):
            self._object(opcode, argument)
        return False

    def _remember(self, opcode: str, argument: Any) -> None:
        if opcode.endswith("GET"):
            self._stack.append(self._memo[argument])
        else:
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]

    def _object(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode == "TUPLE":
            elements = self._since_mark()
            stack.append(tuple(elements))
        elif opcode == "GLOBAL":
            stack.append(self._name(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self._name(module, name))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._call(called, arguments))
        elif opcode == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif opcode == "BUILD":
            self._build(stack.pop())
        else:
            raise refused(f"has the instruction {opcode}")

    def _tuple(self, length: int) -> None:
        elements = tuple(self._stack[-length:])
        if len(elements) != length:
            raise IndexError("a tuple of too few elements")
        del self._stack[-length:]
        self._stack.append(elements)

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _Mark:
                elements = stack[place + 1 :]
                del stack[place:]
                return elements
        raise IndexError("no mark")

    def _name(self, module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str:
            raise refused("names what is no text")
        text = f"{module}.{name}"
        if text not in self._known:
            raise _unread(text)
        return self._known[text]

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise refused("calls what is no function")
        return name.call(arguments)

    def _fill(self, opcode: str) -> None:
        elements = self._since_mark() if opcode.endswith("S") else self._popped(opcode)
        target = self._stack[-1]
        if opcode.startswith("APPEND") and type(target) is list:
            target.extend(elements)
        elif opcode.startswith("SETITEM") and type(target) is dict:
            for key, value in zip(elements[::2], elements[1::2], strict=True):
                if type(key) not in (str, int):
                    raise refused("has keys that are neither texts nor whole numbers")
                target[key] = value
        else:
            raise refused(f"fills a {type(target).__name__}")

    def _popped(self, opcode: str) -> list[Any]:
        count = 2 if opcode == "SETITEM" else 1
        elements = self._stack[-count:]
        del self._stack[-count:]
        return elements

    def _build(self, state: Any) -> None:
        """State is kept for the classes that the caller expects; a state_dict's is of no use."""
        target = self._stack[-1]
        if isinstance(target, Stateful):
            target.set_state(state)
        elif isinstance(target, Instance) and type(state) is dict:
            target.state.update(state)
        elif not (type(target) is dict and type(state) is dict):
            raise refused("sets the state of what is no plain object")


_PUSHED = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_MEMO = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"})
_FILLS = frozenset({"SETITEM", "SETITEMS", "APPEND", "APPENDS"})
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _Mark,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


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


def _maker(kind: str) -> Call:
    def make(arguments: tuple[Any, ...]) -> Instance:
        if arguments:
            raise refused(f"makes a {kind} in an unexpected way")
        return Instance(kind)

    return make


def _not_callable(name: str) -> Call:
    def call(_: tuple[Any, ...]) -> Any:
        raise refused(f"calls {name}")

    return call


_CALLS: Mapping[str, Call] = {
    "torch._utils._rebuild_tensor_v2": _rebuilt_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
}
