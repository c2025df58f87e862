"""What a sequence leaves behind in a model between two passes.

Most of it is in the cache that the model makes itself, of whatever class. Some models also keep
tensors on their modules (RecurrentGemma its recurrent state); those are put back before the
sequence's next pass, so that sequences may take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Place = tuple[nn.Module, str]
"""A module and the name of an attribute that is no parameter, buffer or module."""


@dataclass
class Memory:
    """One sequence's cache, and the values of the model's own `Places`."""

    cache: Any = None
    kept: dict[Place, Any] = field(default_factory=dict)


class Places:
    """The attributes in which a model keeps tensors between passes.

    Assumes: `before` was taken ahead of the first pass, and no two passes run at once.
    """

    def __init__(self, model: nn.Module, before: dict[Place, Any]) -> None:
        """Finds what has changed since `before`."""
        self._fresh = {
            place: before.get(place)
            for place, value in attributes(model)
            if isinstance(value, Tensor) and before.get(place) is not value
        }

    def fresh(self, cache: Any) -> Memory:
        """The memory of a sequence of which nothing is computed."""
        return Memory(cache, dict(self._fresh))

    def load(self, memory: Memory) -> None:
        """Puts a sequence's tensors where the model looks for them."""
        for (module, name), value in memory.kept.items():
            setattr(module, name, value)

    def store(self, memory: Memory) -> None:
        """Takes them again after a pass."""
        for module, name in self._fresh:
            memory.kept[module, name] = getattr(module, name)


def attributes(model: nn.Module) -> Iterator[tuple[Place, Any]]:
    """Every place of `model`, and what is there now."""
    for module in model.modules():
        for name, value in vars(module).items():
            if value is None or isinstance(value, Tensor):
                yield (module, name), value
