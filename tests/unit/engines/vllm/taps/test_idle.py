"""What a tap costs while nothing is steered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch

from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.taps import EagerTap, Halves


class Visited:
    """A pass that notes where it was reached."""

    def __init__(self, *taps: int) -> None:
        self.taps = frozenset(taps)
        self.seen: list[int] = []

    def visit(self, tap: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        self.seen.append(tap)


def calls(tap: Callable[..., Halves]) -> list[str]:
    """The Python functions that one call of `tap` runs."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            found.append(frame.f_code.co_name)

    hidden, residual = torch.ones(1, 2), torch.ones(1, 2)
    sys.setprofile(note)
    try:
        halves = tap(hidden, residual)
    finally:
        sys.setprofile(None)
    assert halves[0] is hidden
    assert halves[1] is residual
    return found


def test_an_idle_tap_is_one_call() -> None:
    assert ops.running is None
    assert calls(EagerTap(3)) == ["forward"]


def test_a_tap_reaches_the_pass_that_has_something_to_do_there() -> None:
    passing = Visited(3)
    ops.set_running(passing)
    try:
        calls(EagerTap(2))
        calls(EagerTap(3))
    finally:
        ops.set_running(None)
    assert passing.seen == [3]


def test_an_idle_operator_looks_no_further() -> None:
    found = calls(lambda *halves: (*halves, torch.ops.steer.visit_pair(*halves, 3))[:2])
    assert "_visit_pair" in found
    assert "visit" not in found
