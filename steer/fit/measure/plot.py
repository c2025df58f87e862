"""Sweeps, calibrations and evaluations as pictures (PNG, or what the file's suffix says)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.artefacts.calibration import Calibration
from steer.errors import SteerError
from steer.fit.measure.evaluate import Evaluation
from steer.fit.measure.sweep import DoseResponse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADE = "#2a9d5c"
NULL: dict[str, Any] = {"color": "#555555", "ms": 5, "ls": "none"}


def plot_dose_response(response: DoseResponse, path: Path, *, title: str) -> None:
    """Score and validity over strength, and the perplexity ratio below. Raises `SteerError` where
    the picture cannot be written."""
    figure = new_figure(5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    strengths = [dose.strength for dose in response.doses]
    upper.plot(strengths, [d.measured.score for d in response.doses], "o-", label="score")
    upper.axhline(response.unsteered.score, color="grey", ls=":", label="score, unsteered")
    valid = [dose.measured.valid for dose in response.doses]
    if None not in valid:
        upper.plot(strengths, valid, "s--", label="valid")
    upper.set(ylabel="share of answers", ylim=(-0.03, 1.03), title=title)
    upper.legend()
    lower.plot(strengths, [d.perplexity_ratio for d in response.doses], "o-", color="C3")
    lower.axhline(1.0, color="grey", ls=":")
    lower.set(xlabel="strength", ylabel="perplexity ratio")
    save_figure(figure, path)


def plot_calibration(
    calibration: Calibration, path: Path, *, title: str, auto: float | None = None
) -> None:
    """Score and validity over strength, KL and perplexity ratio below; the calibrated range is
    shaded, and the upper axis tells the KL at its strengths. Raises `SteerError`."""
    figure = new_figure(6.4)
    scored = calibration.effect is not None
    axes = figure.subplots(3 if scored else 2, 1, sharex=True, squeeze=False)[:, 0]
    strengths = [dose.strength for dose in calibration.doses]
    for axis in axes:
        axis.axvspan(0, calibration.safe_strength, color=SHADE, alpha=0.1, lw=0)
    if scored:
        _plot_scores(axes[0], calibration, auto)
    kl, perplexity = axes[-2:]
    kl.plot(strengths, [dose.kl for dose in calibration.doses], "o-", color="C4", ms=4)
    kl.set(ylabel="KL (nats)", ylim=(0, None))
    ratios = [dose.perplexity_ratio for dose in calibration.doses]
    perplexity.plot(strengths, ratios, "o-", color="C3", ms=4)
    perplexity.axhline(calibration.limits.perplexity_ratio, color="grey", ls=":", label="limit")
    perplexity.set(xlabel="strength", ylabel="perplexity ratio")
    perplexity.legend()
    axes[0].set_xlim(0, strengths[-1])
    _kl_axis(axes[0], calibration)
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


def plot_evaluation(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """A bar for each method's score, its interval, and marks for validity and nulls. Raises
    `SteerError`."""
    rows = evaluation.rows
    figure = new_figure(1.6 + 0.45 * len(rows))
    axis = figure.subplots()
    colours = {"unsteered": "#999999", "prompt": "#e9a23b", "steering": "C0"}
    places = range(len(rows))
    axis.barh(
        places,
        [row.score.value for row in rows],
        xerr=[
            [row.score.value - row.score.low for row in rows],
            [row.score.high - row.score.value for row in rows],
        ],
        color=[colours[row.kind] for row in rows],
        capsize=3,
        label="score",
    )
    if all(row.valid is not None for row in rows):
        valid = [row.valid.value for row in rows if row.valid is not None]
        axis.plot(valid, places, "D", color="black", ms=4, ls="none", label="valid")
    nulls = [
        (one.score, place)
        for place, row in enumerate(rows)
        if row.nulls is not None
        for one in row.nulls.nulls
    ]
    if nulls:
        axis.plot(*zip(*nulls, strict=True), "x", **NULL, label="nulls, equal KL")
    axis.set_yticks(places, [row.name for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"share of answers, {evaluation.prompts} prompts", xlim=(0, 1.03), title=title)
    axis.legend()
    save_figure(figure, path)


def _plot_scores(axis: Axes, calibration: Calibration, auto: float | None) -> None:
    doses = calibration.doses
    strengths = [dose.strength for dose in doses]
    scores = [dose.score for dose in doses if dose.score is not None]
    axis.plot(strengths, scores, "o-", ms=4, label="score")
    valid = [dose.valid for dose in doses if dose.valid is not None]
    if valid:
        axis.plot(strengths, valid, "s--", color="C1", ms=3, label="valid")
    if auto is not None:
        axis.axvline(auto, color=SHADE, ls="--", label="auto")
    nulls = calibration.nulls
    if nulls is not None and nulls.nulls:
        at = [nulls.strength] * len(nulls.nulls)
        axis.plot(at, [one.score for one in nulls.nulls], "x", **NULL, label="nulls, equal KL")
    axis.set(ylabel="share of answers", ylim=(-0.03, 1.05))
    axis.legend()


def _kl_axis(axis: Axes, calibration: Calibration) -> None:
    """Labels on top: the KL at the ticks that lie in the calibrated range."""
    top = axis.secondary_xaxis("top")
    end = calibration.safe_strength
    ticks = [tick for tick in axis.get_xticks() if 0 < tick <= end]
    top.set_xticks(ticks, [f"{calibration.kl_at(tick):.2g}" for tick in ticks])
    top.set_xlabel("KL (nats)")


def new_figure(height: float, width: float = 6.4) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow import)

    # A Figure of its own, without pyplot: nothing global, no window.
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes the figure; raises `SteerError` (`not_written`)."""
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SteerError(
            f"the plot {str(path)!r} cannot be written: {error}", code="not_written"
        ) from error
