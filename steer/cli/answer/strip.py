"""Read-outs of an answer in the terminal: a line for each token, a column for each reading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_BAR, _WIDTH = "█", 6
"""What a value is drawn with, and the columns of the largest."""
_WORDS = 24
"""The most characters of what is ranked."""

Entry = Mapping[str, Any]


def strip(title: str, entries: Sequence[Entry]) -> Table:
    """A table of `entries`, as `ReadoutWriter` writes them; bars are drawn to the largest value of
    their column, negative ones in red."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    tokens = [repr(entry["token"])[1:-1] for entry in entries]
    table.add_column("token", style="bold", no_wrap=True, min_width=max(map(len, tokens)))
    rows = [dict(_cells(entry)) for entry in entries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        words = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name, no_wrap=True, min_width=_WORDS if words else 8 + _WIDTH)
    largest = {name: max(map(_size, (row.get(name) for row in rows))) for name in columns}
    for token, entry, row in zip(tokens, entries, rows, strict=True):
        cells = [_cell(row.get(name), largest[name]) for name in columns]
        style = "dim" if entry["phase"] == "prompt" else ""
        table.add_row(Text(token), *cells, style=style)
    return table


def _cells(entry: Entry) -> Iterator[tuple[str, float | str | None]]:
    """The readings of a token by column: numbers, and the first of what is ranked as text."""
    for one in entry.get("projections", ()):
        yield f"{one['vector']} {one['layer']}", one["value"]
    for one in entry.get("features", ()):
        for each in one.get("features", ()):
            yield f"{one['sae']} #{each['feature']}", each["activation"]
        if "top" in one:
            yield f"{one['sae']} top", ", ".join(map(_named, one["top"][:1]))
    for one in entry.get("lens", ()):
        best = (one["top"] or [{"token": "?", "probability": None}])[0]
        yield f"lens {one['layer']}", f"{best['token']!r} {_short(best['probability'])}"
    for field, name in (("norms", "norm"), ("relative_size", "edit")):
        for one in entry.get(field, ()):
            yield f"{name} {one['layer']}", one["value"]
    if "kl" in entry:
        yield "kl", entry["kl"]


def _named(feature: Mapping[str, Any]) -> str:
    label = feature.get("label", {}).get("text")
    return f"#{feature['feature']} {_short(feature['activation'])}" + (f" {label}" if label else "")


def _size(value: float | str | None) -> float:
    return abs(value) if isinstance(value, float) else 0.0


def _cell(value: float | str | None, largest: float) -> Text:
    if value is None:
        return Text("")
    if isinstance(value, str):
        return Text(value if len(value) <= _WORDS else value[: _WORDS - 1] + "…")
    length = math.ceil(_WIDTH * abs(value) / largest) if largest else 0
    text = Text(f"{_short(value):>7} ")
    return text.append(_BAR * length, style="red" if value < 0 else "green")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
