"""The operators that launch the kernels: `steer::edit_pair` and `steer::edit_one`.

A process has one model that is steered, and its form is the one that they launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.taps import ops
from steer.errors import EngineError

_form: StaticForm | None = None


def set_form(form: StaticForm | None) -> None:
    """Makes `form` the one that the operators launch: a process has one model that is steered."""
    global _form  # noqa: PLW0603
    _form = form


def _edit(hidden: Tensor, residual: Tensor | None, tap: int) -> None:
    if _form is None:
        raise EngineError("a tap was reached before its tables were made")
    _form.edit(tap, hidden, residual)
    # Where a graph is captured or replayed, nobody runs in Python.
    ops.visit(tap, hidden, residual)


def edit_pair(hidden: Tensor, residual: Tensor, tap: int) -> None:
    """Edits `hidden` + `residual`, which are added later, in place."""
    _edit(hidden, residual, tap)


def edit_one(hidden: Tensor, tap: int) -> None:
    """Edits `hidden` in place."""
    _edit(hidden, None, tap)


def _nothing(*_: object) -> None:
    """What the operators do to tensors without data."""


_library: Any = torch.library.Library("steer", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("edit_pair(Tensor(a!) hidden, Tensor(b!) residual, int tap) -> ()")
_library.define("edit_one(Tensor(a!) hidden, int tap) -> ()")
_library.impl("edit_pair", edit_pair, "CompositeExplicitAutograd")
_library.impl("edit_one", edit_one, "CompositeExplicitAutograd")
torch.library.register_fake("steer::edit_pair", _nothing, lib=_library)
torch.library.register_fake("steer::edit_one", _nothing, lib=_library)
