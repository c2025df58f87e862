"""Watching what a model's modules are given and return, and standing in for some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """The last call of a module in a pass; `input` and `output` are copies of its states.

    `order` counts the calls of the pass, `times` the calls of this module.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any
    input: Tensor | None
    output: Tensor | None
    order: int
    times: int


def first_tensor(value: Any) -> Tensor:
    """The hidden state in what a module takes or returns: the tensor, or a tuple's first."""
    return value if isinstance(value, Tensor) else value[0]


def with_first(value: Any, state: Tensor) -> Any:
    """What a module takes or returns, with `state` for its hidden state."""
    return type(value)((state, *value[1:])) if isinstance(value, tuple | list) else state


def given_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden state among a module's arguments."""
    place = _place(args, kwargs)
    return None if place is None else args[place] if isinstance(place, int) else kwargs[place]


def with_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, with `state` for the hidden state."""
    place = _place(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], state, *args[place + 1 :]), kwargs
    return args, {**kwargs, str(place): state}


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the hidden state is: the first argument, or the one that is named for it, or else the
    first tensor that is named."""
    if args:
        return 0 if isinstance(args[0], Tensor) else None
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    return next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """The last call of each of `modules` inside the `with` block."""
    seen: dict[nn.Module, Call] = {}
    calls = 0

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal calls
        returned = out[0] if isinstance(out, tuple | list) and out else out
        times = seen[module].times + 1 if module in seen else 1
        given = given_tensor(args, kwargs)
        seen[module] = Call(args, kwargs, out, _copy(given), _copy(returned), calls, times)
        calls += 1

    handles = [m.register_forward_hook(observe, with_kwargs=True) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def standing_in(stand_ins: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the `with` block each of the modules computes its stand-in; hooks on it still run.

    Assumes: nobody else calls the model meanwhile.
    """
    # Also where something else, such as offloading, has put a forward of its own on a module.
    own = {module: vars(module).get("forward") for module in stand_ins}
    try:
        for module, stand_in in stand_ins.items():
            module.forward = stand_in
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def returning(value: Any, state: Tensor) -> Callable[..., Any]:
    """Returns what a module returned, with `state` for its hidden state, whatever it is given."""
    # A copy: some models add to what a module returned in place.
    return lambda *_args, **_kwargs: with_first(value, state.clone())


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; every module is as it was afterwards."""
    learning = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in learning:
            module.training = True


def _copy(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None
