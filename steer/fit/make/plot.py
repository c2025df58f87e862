"""A made vector as a picture: what was tried, and what came out beside words and chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steer.fit.make.made import Made
from steer.fit.measure.plot import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"unsteered": "#999999", "in words": "#e9a23b", "steered": "C0"}
_MARKS = {"all": "o", "onward": "s", "last": "v", "generation": "^"}


def plot_made(found: Made, path: Path) -> None:
    """Left: every trial by its KL, the chosen one ringed. Right: the check's scores with their
    intervals, and the nulls as dots. Raises `SteerError` where the picture cannot be written."""
    figure = new_figure(3.8, width=9.6)
    left, right = figure.subplots(1, 2)
    _trials(left, found)
    _check(right, found)
    figure.suptitle(f"{found.wish.name}: “{found.wish.instruction}”", fontsize="medium")
    save_figure(figure, path)


def _trials(axis: Axes, found: Made) -> None:
    runs = sorted({one.use.layers for one in found.choice.trials})
    for one in found.choice.trials:
        axis.plot(
            one.kl,
            one.both,
            _MARKS[one.use.where],
            color=f"C{runs.index(one.use.layers) % 10}",
            fillstyle="full" if one.use.source == "response" else "none",
            ms=5,
        )
    for place, run in enumerate(runs):
        axis.plot([], [], "o", color=f"C{place % 10}", label=f"layers {run[0]}–{run[-1]}")
    best = found.choice.best
    axis.plot(best.kl, best.both, "o", color="black", fillstyle="none", ms=12, label="chosen")
    axis.set(xlabel="KL (nats)", ylabel="score of sound answers", ylim=(-0.03, 1.03))
    axis.legend(fontsize="x-small")


def _check(axis: Axes, found: Made) -> None:
    names = [row.name for row in found.check.rows]
    for place, row in enumerate(found.check.rows):
        error = [[row.score.value - row.score.low], [row.score.high - row.score.value]]
        axis.barh(place, row.score.value, xerr=error, color=_COLOURS[row.name], capsize=3)
    nulls = found.check.comparison.nulls
    for kind in dict.fromkeys(one.kind for one in nulls):
        scores = [one.score for one in nulls if one.kind == kind]
        axis.plot(scores, [len(names)] * len(scores), "o", color="C3", alpha=0.6, ms=5)
        names.append(f"chance: {kind}")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=f"score, {found.check.questions} other questions", xlim=(0, 1.03))
