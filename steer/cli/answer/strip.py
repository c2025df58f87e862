"""Read-outs of an answer in the terminal: a line for each token, a column for each reading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

_BAR, _WIDTH = "█", 6
"""What a value is drawn with, and the columns of the largest."""
_WORDS = 24
"""The most characters of what is ranked."""

Entry = Mapping[str, Any]


class StripCell(NamedTuple):
    """One reading of a token: a number, or what is ranked first by `name`, its number, and a `note`
    of what it means; an empty name where there is nothing to rank."""

    value: float | None
    name: str | None = None
    note: str = ""

    @property
    def number(self) -> str:
        """The number as it is shown; nothing where there is none."""
        return "" if self.value is None else _short(self.value)


def token_text(entry: Entry) -> str:
    """A token on one line."""
    return repr(entry["token"])[1:-1]


def strip(title: str, entries: Sequence[Entry]) -> Table:
    """A table of `entries`, as `ReadoutWriter` writes them; bars are drawn to the largest value of
    their column, negative ones in red."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    tokens = [token_text(entry) for entry in entries]
    table.add_column("token", style="bold", no_wrap=True, min_width=max(map(len, tokens)))
    rows = [dict(readings(entry)) for entry in entries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        words = any(name in row and row[name].name is not None for row in rows)
        table.add_column(name, no_wrap=True, min_width=_WORDS if words else 8 + _WIDTH)
    largest = {name: max(map(_size, (row.get(name) for row in rows))) for name in columns}
    for token, entry, row in zip(tokens, entries, rows, strict=True):
        cells = [_cell(row.get(name), largest[name]) for name in columns]
        style = "dim" if entry["phase"] == "prompt" else ""
        table.add_row(Text(token), *cells, style=style)
    return table


def readings(entry: Entry) -> Iterator[tuple[str, StripCell]]:
    """The readings of a token by name: numbers, and the first of what is ranked."""
    for one in entry.get("projections", ()):
        yield f"{one['vector']} {one['layer']}", StripCell(one["value"])
    for one in entry.get("features", ()):
        for each in one.get("features", ()):
            yield f"{one['sae']} #{each['feature']}", StripCell(each["activation"])
        if "top" in one:
            yield f"{one['sae']} top", _first(one["top"])
    for one in entry.get("lens", ()):
        best = (one["top"] or [{"token": "?", "probability": None}])[0]
        yield f"lens {one['layer']}", StripCell(best["probability"], repr(best["token"]))
    for field, name in (("norms", "norm"), ("relative_size", "edit")):
        for one in entry.get(field, ()):
            yield f"{name} {one['layer']}", StripCell(one["value"])
    if "kl" in entry:
        yield "kl", StripCell(entry["kl"])


def _first(top: Sequence[Mapping[str, Any]]) -> StripCell:
    """The most active of the features."""
    if not top:
        return StripCell(None, "")
    label = top[0].get("label", {}).get("text")
    return StripCell(top[0]["activation"], f"#{top[0]['feature']}", label or "")


def _size(reading: StripCell | None) -> float:
    return 0.0 if reading is None or reading.value is None else abs(reading.value)


def _cell(reading: StripCell | None, largest: float) -> Text:
    if reading is not None and reading.name is not None:
        words = " ".join(filter(None, (reading.name, reading.number, reading.note)))
        return Text(words if len(words) <= _WORDS else words[: _WORDS - 1] + "…")
    value = None if reading is None else reading.value
    if value is None:
        return Text("")
    length = math.ceil(_WIDTH * abs(value) / largest) if largest else 0
    text = Text(f"{_short(value):>7} ")
    return text.append(_BAR * length, style="red" if value < 0 else "green")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
