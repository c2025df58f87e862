"""Thresholds, what was measured against them, and the table of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from steer_vectors.demo.recipe.evaluation.estimates import Estimate


@dataclass(frozen=True)
class Check:
    """One row: a measured value and the least (or, with ``at_most``, the most) it may be.

    A ``part`` is shown with its verdict, but fails nothing by itself: a row about several parts
    does. ``bound`` None is for rows that are only shown. With ``noise`` the verdict is that of
    `within_error`.
    """

    group: str
    what: str
    measured: Estimate
    bound: float | None
    at_most: bool = False
    part: bool = False
    noise: bool = False

    @property
    def met(self) -> bool:
        """Whether the measured value itself keeps the bound."""
        if self.noise:
            return self.within_error
        return self._keeps(self.measured.value, self.measured.value)

    @property
    def within_error(self) -> bool:
        """Whether some value in the 95 % interval keeps the bound: for few prompts."""
        return self._keeps(self.measured.low, self.measured.high)

    def _keeps(self, low: float, high: float) -> bool:
        if self.bound is None:
            return True
        return low <= self.bound if self.at_most else high >= self.bound

    @property
    def fails(self) -> bool:
        """Whether the demo model is not finished because of this row."""
        return not (self.part or self.met)

    def as_json(self) -> dict[str, Any]:
        """Everything in the row, and its verdict."""
        return {**asdict(self), "met": None if self.bound is None else self.met}


def count(group: str, what: str, good: Iterable[bool], bound: int) -> Check:
    """A row that asks for so many of several parts. It has no interval: its parts have."""
    every = list(good)
    number = float(sum(every))
    return Check(group, what, Estimate(number, number, number, len(every)), float(bound))


def table(checks: Iterable[Check]) -> str:
    """All rows as a Markdown table."""
    lines = ["| Group | Measured | Value | 95 % | n | Threshold | |", "|---" * 7 + "|"]
    return "\n".join([*lines, *(_row(check) for check in checks)])


def _row(check: Check) -> str:
    measured = check.measured
    cells = [check.group, check.what, _number(measured.value)]
    cells += [
        f"{_number(measured.low)} to {_number(measured.high)}"
        if measured.low < measured.high
        else "",
        str(measured.n),
    ]
    if check.bound is None:
        cells += ["", ""]
    else:
        sign = "≤" if check.at_most else "≥"
        cells += [f"{sign} {check.bound:g}", _verdict(check)]
    return f"| {' | '.join(cells)} |"


def _verdict(check: Check) -> str:
    if check.part:
        return "yes" if check.met else "no"
    return "met" if check.met else "**not met**"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) > 1 else f"{value:.3f}"
