"""The opaque operators through which a compiled graph reaches the forward pass that runs now.

They stay inside the graph (nothing is split around them), change their arguments in place, and
return at once where the running pass has nothing to do at their tap. Which pass runs is known to
this process alone: a worker runs one forward pass at a time.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Visitor(Protocol):
    """A forward pass, as its taps see it."""

    taps: frozenset[int]

    def visit(self, tap: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Edits and reads `hidden` and `residual` `[T, d]`, whose sum is the stream, in place."""


running: Visitor | None = None
"""The pass that the operators reach; read it as `ops.running`, and change it by `set_running`."""


def set_running(visitor: Visitor | None) -> None:
    """Makes `visitor` the pass that the operators reach; None between passes."""
    global running  # noqa: PLW0603
    running = visitor


def visit(tap: int, hidden: Tensor, residual: Tensor | None) -> None:
    """Shows the two halves of the stream at `tap` to the running pass."""
    if running is not None and tap in running.taps:
        running.visit(tap, hidden, residual)


def _visit_pair(hidden: Tensor, residual: Tensor, tap: int) -> None:
    if running is not None:
        visit(tap, hidden, residual)


def _visit_one(hidden: Tensor, tap: int) -> None:
    if running is not None:
        visit(tap, hidden, None)


def _nothing(*_: object) -> None:
    """What the operators do to tensors without data."""


# Defined through `Library`, whose operators cost a third of a `custom_op` to call.
_library: Any = torch.library.Library("steer", "DEF")  # type: ignore[no-untyped-call]
_library.define("visit_pair(Tensor(a!) hidden, Tensor(b!) residual, int tap) -> ()")
_library.define("visit_one(Tensor(a!) hidden, int tap) -> ()")
_library.impl("visit_pair", _visit_pair, "CompositeExplicitAutograd")
_library.impl("visit_one", _visit_one, "CompositeExplicitAutograd")
torch.library.register_fake("steer::visit_pair", _nothing, lib=_library)
torch.library.register_fake("steer::visit_one", _nothing, lib=_library)
