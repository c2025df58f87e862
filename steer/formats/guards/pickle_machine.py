"""Runs pickles without ever calling what they name.

A pickle is a program for a small stack machine. This module runs that machine itself, over the few
instructions that dictionaries, lists, numbers, texts and tensors need. Names are given by the
caller, each with a function that stands for it; any other instruction or name is refused by name,
so nothing that a file says is ever imported or called. Keys are texts and numbers, which also rules
out the nested tuples that take for ever to hash.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, TypeAlias, runtime_checkable

from steer.errors import FileFormatError

Call: TypeAlias = Callable[[tuple[Any, ...]], Any]
_SET = ("builtins", "set")


class _Mark:
    """Where the elements of a tuple, list or dictionary begin."""


@dataclass(frozen=True)
class Name:
    """A name in a pickle that this module knows; `call` is what stands for it."""

    text: str
    call: Call


@dataclass
class Instance:
    """What stands for an object of a class that the caller expects: the state its pickle gives it,
    and nothing of what it is made of or filled with. Also for what a function of the same name
    would give."""

    kind: str
    state: dict[Any, Any] = field(default_factory=dict)


@runtime_checkable
class Stateful(Protocol):
    """An object, made by a name of the caller's, that its pickle gives a state."""

    def set_state(self, state: Any) -> None:
        """Raises `FileFormatError` for a state that it cannot have."""


@runtime_checkable
class Followed(Stateful, Protocol):
    """An object whose numbers follow its state in the file, outside of the pickle's program."""

    def read_on(self, stream: BinaryIO) -> None:
        """Takes its numbers from `stream`, which stands behind its state. Raises
        `FileFormatError`."""


def refused(what: str, hint: str = "") -> FileFormatError:
    """The error for a pickle that names or does more than tensors need."""
    return FileFormatError(
        f"the file is a pickle that holds more than tensors: it {what}. Opening such a file can "
        "run code, so it is never read here: save its tensors alone (torch.save of a dictionary "
        f"of tensors, or safetensors.torch.save_file){hint}",
        code="pickle_refused",
    )


class PickleMachine:
    """The stack machine, over the next pickle of `stream`, which is left behind it.

    `named` gives what stands for a name, or raises for one that is refused; `persistent` what a
    persistent id stands for. Guarantees: a step takes time and memory that the pickle's own length
    bounds.
    """

    def __init__(
        self,
        named: Callable[[str], Name],
        persistent: Callable[[Any], Any],
        stream: BinaryIO,
    ) -> None:
        self._named, self._persistent, self._stream = named, persistent, stream
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._result: Any = None

    def run(self) -> Any:
        """The object pickled. Raises `FileFormatError`."""
        try:
            # One by one, so that what follows a `Followed` is not taken for instructions.
            for opcode, argument, _ in pickletools.genops(self._stream):
                if self._step(opcode.name, argument):
                    break
        except FileFormatError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as odd:
            raise FileFormatError(f"the pickle is damaged: {odd}") from odd
        return self._result

    def _step(self, opcode: str, argument: Any) -> bool:
        """Runs one instruction; whether it was the last."""
        if opcode == "STOP":
            self._result = self._stack.pop()
            return True
        if opcode in _PUSHED:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode == "EMPTY_SET":
            self._stack.append(self._name(*_SET).call(()))
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
        return self._named(f"{module}.{name}")

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
                target[_key(key)] = value
        elif not isinstance(target, Instance):
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
            if isinstance(target, Followed):
                target.read_on(self._stream)
        elif isinstance(target, Instance):
            target.state.update(state if type(state) is dict else {})
        elif not (type(target) is dict and type(state) is dict):
            raise refused("sets the state of what is no plain object")


def _key(key: Any) -> str | int:
    """The key itself, or a text that names no layer for a number that numbers none."""
    if type(key) in (float, bool):
        return f"{type(key).__name__}({key})"
    if type(key) not in (str, int):
        raise refused("has keys that are neither texts nor numbers")
    return key  # type: ignore[no-any-return]


_PUSHED = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_MEMO = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"})
_FILLS = frozenset({"SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS"})
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
