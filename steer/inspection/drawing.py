"""Heat maps as pictures, with matplotlib's Agg canvas directly: no display, no global state, safe
in any thread, and the same bytes for the same input.

Only a picture that is drawn imports this, because matplotlib takes half a second to load.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from steer.inspection.token_labels import fonts, token_label

if TYPE_CHECKING:
    from steer.inspection.heatmap import HeatMap

COLUMNS_PER_PANEL = 16
_CELL_WIDTH, _CELL_HEIGHT = 0.88, 0.36
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 0.75, 1.05, 0.72, 0.62, 0.06
_LETTER = 0.072
"""What a letter of a row's name takes."""
_DPI = 144
_INK, _FAINT = "#1f2933", "#7b8794"
_SHADES = LinearSegmentedColormap.from_list(
    "steer", ["#f7f9fc", "#d3e4f3", "#8fbfe0", "#3d8bc4", "#15528f", "#0b2a52"]
)


def draw_png(heat: HeatMap) -> bytes:
    """The picture of `heat`; wide tables are folded into panels of `COLUMNS_PER_PANEL` columns."""
    buffer = io.BytesIO()
    # Without the version of the library that drew it: the same input gives the same bytes.
    _Drawing(heat).figure().savefig(buffer, format="png", dpi="figure", metadata={"Software": None})
    return buffer.getvalue()


class _Drawing:
    """One `HeatMap` on a figure; sizes in inches, from the top left."""

    def __init__(self, heat: HeatMap) -> None:
        self.heat = heat
        self.colours: Colormap = colormaps["RdBu_r"] if heat.diverging else _SHADES
        self.norm = Normalize(*heat.limits)
        self.panels = math.ceil(len(heat.columns) / COLUMNS_PER_PANEL)
        self.across = math.ceil(len(heat.columns) / self.panels)
        self.panel_height = len(heat.rows) * _CELL_HEIGHT
        drawn = max(self.across * _CELL_WIDTH, 3.6)
        self.left = max(_LEFT, 0.3 + _LETTER * max(map(len, heat.rows), default=0))
        self.width = self.left + drawn + _RIGHT
        self.height = _TOP + self.panels * (self.panel_height + _BOTTOM + _GAP)

    def figure(self) -> Figure:
        figure = Figure(figsize=(self.width, self.height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        self._heading(figure)
        for panel in range(self.panels):
            start = panel * self.across
            end = min(start + self.across, len(self.heat.columns))
            self._panel(figure, panel, start, end)
        self._scale(figure)
        return figure

    def _heading(self, figure: Figure) -> None:
        left = self.left / self.width
        for text, down, size, colour, weight in (
            (self.heat.title, 0.30, 13, _INK, "bold"),
            (self.heat.subtitle, 0.53, 8.5, _FAINT, "normal"),
        ):
            figure.text(
                left,
                1 - down / self.height,
                text,
                fontsize=size,
                color=colour,
                fontweight=weight,
                fontfamily=fonts(),
                parse_math=False,
            )

    def _panel(self, figure: Figure, panel: int, start: int, end: int) -> None:
        heat = self.heat
        top = _TOP + panel * (self.panel_height + _BOTTOM + _GAP)
        axes = figure.add_axes(
            (
                self.left / self.width,
                1 - (top + self.panel_height) / self.height,
                (end - start) * _CELL_WIDTH / self.width,
                self.panel_height / self.height,
            )
        )
        axes.set_xlim(0, end - start)
        axes.set_ylim(0, len(heat.rows))
        for row in range(len(heat.rows)):
            for column in range(start, end):
                self._cell(axes, row, column, column - start)
        axes.set_xticks([n + 0.5 for n in range(end - start)])
        axes.set_yticks([n + 0.5 for n in range(len(heat.rows))])
        axes.set_xticklabels(heat.columns[start:end], fontsize=8, color=_INK)
        axes.set_yticklabels(heat.rows, fontsize=8, color=_INK)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)
            label.set_fontfamily(fonts())
        axes.tick_params(length=0, pad=4)
        axes.set_ylabel(heat.row_label, fontsize=8.5, color=_FAINT, labelpad=6)
        if panel == self.panels - 1:
            axes.set_xlabel(heat.column_label, fontsize=8.5, color=_FAINT, labelpad=4)
        for spine in axes.spines.values():
            spine.set_visible(False)

    def _cell(self, axes: Axes, row: int, column: int, place: int) -> None:
        value = self.heat.values[row][column]
        red, green, blue, _ = self.colours(self.norm(value))
        axes.add_patch(
            Rectangle((place, row), 1, 1, facecolor=(red, green, blue), edgecolor="white", lw=1.2)
        )
        if (row, column) in self.heat.marked:
            axes.add_patch(
                Rectangle(
                    (place + 0.05, row + 0.09), 0.9, 0.82, fill=False, edgecolor="#f0a202", lw=1.8
                )
            )
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.58
        axes.text(
            place + 0.5,
            row + 0.48,
            token_label(self.heat.texts[row][column]),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else _INK,
            fontfamily=fonts(),
            parse_math=False,
        )

    def _scale(self, figure: Figure) -> None:
        height = min(max(self.panel_height, 1.1), 2.6)
        axes = figure.add_axes(
            (
                1 - (_RIGHT - 0.22) / self.width,
                1 - (_TOP + height) / self.height,
                0.13 / self.width,
                height / self.height,
            )
        )
        bar = figure.colorbar(ScalarMappable(self.norm, self.colours), cax=axes)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7.5, length=0, colors=_FAINT)
        bar.set_label(self.heat.scale, fontsize=8.5, color=_FAINT)
