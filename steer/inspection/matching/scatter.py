"""Named points in a plane, drawn as heat maps are: no display, and the same bytes each time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from steer.inspection.token_labels import fonts, token_label

_INK, _FAINT, _DOT = "#1f2933", "#7b8794", "#15528f"


@dataclass(frozen=True)
class Scatter:
    """`points` are `(across, up)`, each with a name of `names`; `axes` name the two directions."""

    title: str
    subtitle: str
    axes: tuple[str, str]
    points: Sequence[tuple[float, float]]
    names: Sequence[str]

    def png(self) -> bytes:
        """The picture, both axes in one unit."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow import)
        from matplotlib.figure import Figure  # noqa: PLC0415

        figure = Figure(figsize=(7.2, 6.4), dpi=144, facecolor="white", layout="tight")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(
            f"{self.title}\n{self.subtitle}",
            fontsize=10,
            color=_INK,
            loc="left",
            fontfamily=fonts(),
            parse_math=False,
        )
        axes.axhline(0.0, color="#d9e0e7", lw=0.8)
        axes.axvline(0.0, color="#d9e0e7", lw=0.8)
        across, up = zip(*self.points, strict=True)
        axes.scatter(across, up, s=26, color=_DOT)
        for name, place in zip(self.names, self.points, strict=True):
            axes.annotate(
                token_label(name, most=28),
                place,
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=_INK,
                fontfamily=fonts(),
                parse_math=False,
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.18)
        axes.set_xlabel(self.axes[0], fontsize=9, color=_FAINT, parse_math=False)
        axes.set_ylabel(self.axes[1], fontsize=9, color=_FAINT, parse_math=False)
        axes.tick_params(labelsize=8, colors=_FAINT)
        for spine in axes.spines.values():
            spine.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi="figure", metadata={"Software": None})
        return buffer.getvalue()
