"""The functions of vLLM that Steer takes hold of, checked by signature before they are touched.

vLLM promises nothing about its inner functions. Each of ours names the parameters it was written
against, and a function that looks different is refused by name and version, at start-up.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from steer.errors import EngineError, Unsupported

CHECKED = "steer_checks"
"""The attribute of a function of vLLM's that checks tickets."""


def version() -> str:
    """The version of vLLM in this process."""
    import vllm  # noqa: PLC0415

    return str(vllm.__version__)


def known(owner: Any, name: str, *parameters: str) -> Any:
    """The function `name` of a module or class; raises `Unsupported` where it is another one.

    `parameters` are the names it must have, in order, `self` included.
    """
    found = vars(owner).get(name)
    function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
    path = f"{getattr(owner, '__module__', '')}.{owner.__name__}".lstrip(".")
    if function is None:
        raise Unsupported(
            f"vLLM {version()} has no {path}.{name}, which steering needs: install a version of "
            "vLLM that this version of Steer names as supported",
            code="unknown_vllm",
        )
    actual = tuple(inspect.signature(inspect.unwrap(function)).parameters)
    if actual != parameters:
        raise Unsupported(
            f"in vLLM {version()}, {path}.{name} takes {actual} and not {parameters}: install a "
            "version of vLLM that this version of Steer names as supported",
            code="unknown_vllm",
        )
    return function


def calls(function: Any, *names: str) -> None:
    """Raises `Unsupported` where `function` does not mention each of `names`.

    An override only acts as long as vLLM calls it; a version that no longer does must not pass.
    """
    mentioned = inspect.unwrap(function).__code__.co_names
    missing = [name for name in names if name not in mentioned]
    if missing:
        raise Unsupported(
            f"in vLLM {version()}, {function.__qualname__} no longer calls {missing}: install a "
            "version of vLLM that this version of Steer names as supported",
            code="unknown_vllm",
        )


def takes(owner: Any, name: str, parameter: str) -> None:
    """Raises `Unsupported` where a module or object has no function `name` with this parameter."""
    function = getattr(owner, name, None)
    actual = () if function is None else tuple(inspect.signature(function).parameters)
    if parameter not in actual:
        raise Unsupported(
            f"in vLLM {version()}, {name} takes {actual} and not {parameter!r}: install a version "
            "of vLLM that this version of Steer names as supported",
            code="unknown_vllm",
        )


@contextmanager
def forced(owner: Any, name: str, **arguments: Any) -> Iterator[None]:
    """Inside the block, each call of the function `name` of a module or object is given
    `arguments`, whatever its caller says."""
    own, function = vars(owner).get(name), getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        return function(*args, **{**named, **arguments})

    setattr(owner, name, call)
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
