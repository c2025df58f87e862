"""The ROC curve of a detector as a picture."""

from __future__ import annotations

from pathlib import Path

from steer.artefacts.detector import Detector
from steer.errors import SteerError
from steer.fit.measure.plot import SHADE, new_figure, save_figure


def plot_roc(detector: Detector, path: Path) -> None:
    """True over false positive rate on held-out texts, the threshold marked. Raises `SteerError`,
    also for a detector whose card has no measures (`no_measures`)."""
    found = detector.detection.measures
    if found is None:
        raise SteerError(
            f"the detector {detector.card.name!r} was never measured: its card has no curve",
            code="no_measures",
        )
    figure = new_figure(4.4, width=4.8)
    axis = figure.subplots()
    false, true = zip(*found.roc, strict=True)
    axis.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    axis.step(
        false,
        true,
        where="post",
        color=SHADE,
        label=f"AUROC {found.auroc.value:.3f} [{found.auroc.low:.3f}, {found.auroc.high:.3f}]",
    )
    axis.plot(
        found.false_positive_rate,
        found.true_positive_rate,
        "o",
        color="C3",
        label=f"threshold {detector.threshold:.2f}",
    )
    axis.set(
        xlabel=f"false positive rate, {found.negative} texts",
        ylabel=f"true positive rate, {found.positive} texts",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        title=f"{detector.card.name}, layer {detector.point.layer}",
    )
    axis.legend(loc="lower right", fontsize="small")
    save_figure(figure, path)
