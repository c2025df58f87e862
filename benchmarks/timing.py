"""Interleaved timing: contestants take turns, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Figures:
    """Rates of one contestant, one per round, in units per second."""

    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({min(self.rates):,.0f}–{max(self.rates):,.0f})"


def interleaved(
    contestants: Mapping[str, Callable[[], float]], *, rounds: int, title: str
) -> dict[str, Figures]:
    """Runs every contestant once per round, after one uncounted round.

    A contestant does its work and returns how many units (tokens) it produced; one that measures
    itself returns a negative rate.
    """
    names = list(contestants)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(rounds + 1), desc=title, leave=False):
        # Every other round runs backwards: nobody always follows the same neighbour.
        for name in names if number % 2 else reversed(names):
            started = time.perf_counter()
            produced = contestants[name]()
            seconds = time.perf_counter() - started
            if number:
                rates[name].append(-produced if produced < 0 else produced / seconds)
    return {name: Figures(tuple(found)) for name, found in rates.items()}


def paired_ratio(a: Figures, b: Figures) -> str:
    """Median and range of a / b, round by round."""
    ratios = [x / y for x, y in zip(a.rates, b.rates, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


def machine() -> str:
    """One line on what this ran on."""
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
