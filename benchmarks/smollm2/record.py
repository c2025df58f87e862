"""What was measured: a JSON file that is whole after every round, and the table made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.smollm2.agreement import Agreement
from benchmarks.smollm2.programs import STEER, Row
from benchmarks.vllm.report import rate, times

Round = dict[str, float]
"""Tokens per second by the title of a row."""

HEADINGS = (
    "measured",
    "computes in",
    "tokens/s",
    "against its plain form",
    "Steer on vLLM by specs is faster by",
    "tokens that are the reference's",
)


@dataclass
class Record:
    """`checked` is how far a row's answers were the reference's, in the worst round; `missing` is
    why a row is not there, or not any longer."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    checked: dict[str, list[int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, path: Path, settings: dict[str, Any], machine: dict[str, Any], *, fresh: bool
    ) -> Record:
        """The record at `path` to go on with, where it was made with the same settings on the same
        machine; otherwise a new one."""
        if path.exists() and not fresh:
            kept = cls(**json.loads(path.read_text()))
            if kept.settings == settings and kept.machine["cpu"] == machine["cpu"]:
                kept.missing = {}
                return kept
        return cls(settings, machine)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        beside.replace(path)

    def check(self, title: str, found: Agreement) -> None:
        known = self.checked.get(title)
        if known is None or found.share < Agreement(*known).share:
            self.checked[title] = list(astuple(found))

    def tells(self, title: str) -> bool:
        """Whether there is anything to say of a row."""
        return title in self.missing or any(title in one for one in self.rounds)

    def table(self, rows: Sequence[Row]) -> str:
        """In Markdown. A ratio is the median over the rounds in which both were measured."""
        lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        lines += [f"| {' | '.join(self._cells(row))} |" for row in rows]
        return "\n".join(lines)

    def _cells(self, row: Row) -> tuple[str, ...]:
        rates = [one[row.title] for one in self.rounds if row.title in one]
        base = "" if row.base is None else self._ratio(row.title, row.base)
        steer = "" if row.title == STEER else self._ratio(STEER, row.title)
        checked = str(Agreement(*self.checked[row.title])) if row.title in self.checked else ""
        measured = [rate(rates)] if rates else []
        if row.title in self.missing:
            measured.append(self.missing[row.title])
        return row.title, row.computes, "; ".join(measured), base, steer, checked

    def _ratio(self, title: str, base: str) -> str:
        found = [one[title] / one[base] for one in self.rounds if {title, base} <= one.keys()]
        return times([found]) if found else ""
