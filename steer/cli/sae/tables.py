"""Tables and lines for a person, as all of `steer sae` prints them."""

from __future__ import annotations

from collections.abc import Sequence

from steer.cli.reporting import out, table_out


def number(value: float | None) -> str:
    """A number with two decimals; a dash for none."""
    return "–" if value is None else f"{value:.2f}"


def chance_of(p: float, q: float | None) -> str:
    """A p-value, and the false discovery rate over what was looked at with it, where known."""
    return f"p = {p:.2g}" if q is None else f"p = {p:.2g}, q = {q:.2g}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of plain texts, folded to the terminal."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    table_out().print(drawn)


def say(line: str) -> None:
    """A line as it is."""
    out().print(line, highlight=False, markup=False)
