"""What a module of vLLM's is called with: one argument, however a caller passes it, as rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

STREAM = "hidden_states"
BEFORE = "residual"


class Argument:
    """One parameter of a module's `forward`, however a caller passes it."""

    @staticmethod
    def names(module: nn.Module) -> list[str]:
        """What the `forward` of `module` takes, in order."""
        return list(inspect.signature(module.forward).parameters)

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.place = self.names(module).index(name)

    def of(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        if self.name in named:
            return named[self.name]
        return args[self.place] if self.place < len(args) else None

    def put(
        self, args: tuple[Any, ...], named: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name in named or self.place >= len(args):
            return args, {**named, self.name: value}
        return (*args[: self.place], value, *args[self.place + 1 :]), named


def rows_of(x: Tensor) -> Tensor:
    """The same memory as `[T, d]`: models of transformers keep a batch dimension of 1."""
    return x.view(-1, x.shape[-1])


def shown(tap: nn.Module, x: Tensor) -> Tensor:
    """`x`, one tensor that nothing is to be added to, after `tap` has seen it."""
    rows = rows_of(x)
    edited, _ = tap(rows, None)
    return x if edited is rows else edited.view_as(x)
