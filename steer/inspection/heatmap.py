"""Heat maps; each method says what its own shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer.errors import TooLarge

MAX_CELLS = 4096


@dataclass(frozen=True)
class HeatMap:
    """A table of values in colour, each cell with a short text.

    `values` and `texts` are `[rows][columns]`; the first row is drawn at the bottom. `marked`
    cells `(row, column)` get a frame. `limits` are the ends of the colour scale; `diverging`
    draws 0 in the middle of two colours.
    """

    title: str
    subtitle: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    texts: Sequence[Sequence[str]]
    scale: str
    limits: tuple[float, float] = (0.0, 1.0)
    diverging: bool = False
    marked: frozenset[tuple[int, int]] = frozenset()

    def png(self) -> bytes:
        """The picture, wide tables folded into several rows of panels.

        Raises `TooLarge` for more than `MAX_CELLS` cells.
        """
        if len(self.rows) * len(self.columns) > MAX_CELLS:
            raise TooLarge(
                f"a heat map of {len(self.rows)} × {len(self.columns)} cells is not readable: "
                f"choose at most {MAX_CELLS} cells, or ask for JSON",
                code="answer_too_large",
                param="/positions",
            )
        from steer.inspection.drawing import draw_png  # noqa: PLC0415 (slow import)

        return draw_png(self)
