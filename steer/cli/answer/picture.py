"""Read-outs of an answer as a heat map: tokens across, a row for each reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steer.cli.answer.strip import Entry, StripCell, readings, token_text

if TYPE_CHECKING:
    from steer.inspection.heatmap import HeatMap

_LETTERS = 11
"""What a cell has room for."""


def write_pictures(path: Path, answers: Mapping[str, Sequence[Entry]]) -> list[Path]:
    """Writes the picture of each answer that has entries, by its title; the files. The steered
    one's is `path`, any other's has its title behind the name.

    Raises `TooLarge` for more readings than one picture shows, before anything is written.
    """
    from steer.cli.fit.saving import write_file

    files = {
        path if title == "steered" else path.with_stem(f"{path.stem}-{title}"): heat_of(
            title, entries
        ).png()
        for title, entries in answers.items()
        if entries
    }
    for file, content in files.items():
        write_file(file, content)
    return list(files)


def heat_of(title: str, entries: Sequence[Entry]) -> HeatMap:
    """The heat map of `entries`, as `ReadoutWriter` writes them. Readings have scales of their own,
    so that colours say how large a number is beside the largest of its row."""
    from steer.inspection.heatmap import HeatMap

    found = [dict(readings(entry)) for entry in entries]
    names = list(dict.fromkeys(name for row in found for name in row))
    values, texts = [], []
    for name in reversed(names):  # the first row is drawn at the bottom
        cells = [row.get(name, StripCell(None)) for row in found]
        largest = max(abs(cell.value or 0.0) for cell in cells) or 1.0
        values.append([(cell.value or 0.0) / largest for cell in cells])
        texts.append([_short(cell) for cell in cells])
    below = any(value < 0 for row in values for value in row)
    return HeatMap(
        title=title,
        subtitle=f"{len(entries)} tokens; colours: share of the largest of each row",
        row_label="",
        column_label="token",
        rows=names[::-1],
        columns=[token_text(entry) for entry in entries],
        values=values,
        texts=texts,
        scale="share of the row's largest",
        limits=(-1.0, 1.0) if below else (0.0, 1.0),
        diverging=below,
    )


def _short(cell: StripCell) -> str:
    text = cell.number if cell.name is None else cell.name
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
