"""Curves by layer as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.inspection.readings import Curve, Share

COLOURS = {
    "patchscope": "#15528f",
    "tuned lens": "#2a9d5c",
    "logit lens": "#e9a23b",
    "shuffled state": "#b0413e",
    "text only": "#7b8794",
    "no state": "#c3cbd4",
}


def draw(panels: Sequence[tuple[str, Sequence[Curve]]], path: Path, *, surprisal: bool) -> None:
    """precision@1 by layer, a panel for each of `panels`, and the surprisal below."""
    rows = 2 if surprisal else 1
    figure = Figure(figsize=(5.2 * len(panels), 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(panels), sharex=True, squeeze=False)
    for column, (title, curves) in enumerate(panels):
        axis = axes[0][column]
        for curve in curves:
            _line(axis, curve, curve.precision)
        axis.set(title=title, ylim=(-0.03, 1.03), ylabel="precision@1")
        if surprisal:
            for curve in curves:
                _line(axes[1][column], curve, curve.surprisal)
            axes[1][column].set(ylabel="surprisal (nats)", ylim=(0, None))
        axes[-1][column].set(xlabel="layer that is read")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _line(axis: Axes, curve: Curve, shares: Sequence[Share]) -> None:
    colour = COLOURS.get(curve.name)
    if len(shares) == 1:
        axis.axhline(shares[0].value, color=colour, ls="--", label=curve.name)
        axis.axhspan(shares[0].low, shares[0].high, color=colour, alpha=0.15, lw=0)
        return
    axis.plot(curve.layers, [one.value for one in shares], color=colour, label=curve.name)
    low, high = [one.low for one in shares], [one.high for one in shares]
    axis.fill_between(curve.layers, low, high, color=colour, alpha=0.15, lw=0)
