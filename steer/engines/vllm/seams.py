"""The functions of vLLM that Steer takes hold of, checked by signature before they are touched.

vLLM promises nothing about its inner functions. What each must look like stands in `internals.py`,
and one that looks different is refused by name and version, at start-up.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from steer.errors import EngineError, Unsupported

CHECKED = "steer_checks"
"""The attribute of a function of vLLM's that checks tickets."""


def version() -> str:
    """The version of vLLM in this process."""
    import vllm  # noqa: PLC0415

    return str(vllm.__version__)


@dataclass(frozen=True)
class Seam:
    """Something of vLLM's that Steer leans on: `name` in `module`, and what must be true of it.

    A function has `parameters`, these and in this order, or `takes` some among others; its code
    `mentions` names, because an override acts only as long as vLLM calls it; a dataclass has
    `fields`.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None = None
    takes: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def moved(self) -> str | None:
        """In one line what is not as expected, with file and name; None where all is."""
        try:
            wrong = self._wrong(self._found())
        except (ImportError, AttributeError) as error:
            wrong = f"is not there ({error})"
        return None if wrong is None else f"{self.module.replace('.', '/')}.py: {self.name} {wrong}"

    def _found(self) -> Any:
        """What `name` stands for; a method is that of the class itself."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            own = vars(found)
            if part not in own:
                raise AttributeError(f"{getattr(found, '__name__', found)} has no {part!r}")
            found = own[part]
        return found.__func__ if isinstance(found, classmethod | staticmethod) else found

    def _wrong(self, found: Any) -> str | None:
        if self.fields:
            lacking = {*self.fields} - {field.name for field in dataclasses.fields(found)}
            return f"lacks {sorted(lacking)}" if lacking else None
        if self.parameters is not None or self.takes:
            actual = tuple(inspect.signature(inspect.unwrap(found)).parameters)
            if self.parameters not in (None, actual):
                return f"takes {actual} and not {self.parameters}"
            if not {*self.takes} <= {*actual}:
                return f"takes {actual} and not {[one for one in self.takes if one not in actual]}"
        used = inspect.unwrap(found).__code__.co_names if self.mentions else ()
        unused = [one for one in self.mentions if one not in used]
        return f"no longer calls {unused}" if unused else None


def check(*seams: Seam) -> None:
    """Raises `Unsupported` where one of `seams` has moved; it tells of all that have."""
    moved = [line for seam in seams if (line := seam.moved()) is not None]
    if moved:
        raise Unsupported(
            f"in vLLM {version()}, {'; '.join(moved)}: install a version of vLLM that this version "
            "of Steer names as supported (python -m steer.engines.vllm.internals lists all that "
            "has moved)",
            code="unknown_vllm",
        )


@contextmanager
def forced(owner: Any, name: str, **arguments: Any) -> Iterator[None]:
    """Inside the block, each call of the function `name` of a module or object is given
    `arguments`, whatever its caller says."""
    function = getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        return function(*args, **{**named, **arguments})

    with replaced(owner, name, call):
        yield


@contextmanager
def replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    """Inside the block, `name` of a module or object is `other`."""
    own = vars(owner).get(name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def assert_checked() -> None:
    """Raises `EngineError` where tickets would reach this process's engine unchecked."""
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415

    if not hasattr(EngineCore.preprocess_add_request, CHECKED):
        raise EngineError(
            "requests would reach this engine without a check of their tickets: Steer's plugin "
            "must be loaded in the engine core (see VLLM_PLUGINS)",
            code="tickets_not_checked",
        )
