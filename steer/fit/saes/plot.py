"""The curve of a training as a picture."""

from __future__ import annotations

from pathlib import Path

from steer.fit.measure.plot import new_figure, save_figure
from steer.fit.saes.training import TrainedSAE


def plot_training(trained: TrainedSAE, path: Path, *, title: str) -> None:
    """What is not explained, the active latents and the dead ones over the rows seen. Raises
    `SteerError` where the picture cannot be written."""
    figure = new_figure(6.4)
    upper, middle, lower = figure.subplots(3, 1, sharex=True)
    _, rows, unexplained, active, dead, _ = zip(*trained.curve, strict=True)
    upper.plot(rows, unexplained, lw=0.8)
    upper.axhline(
        1 - trained.measures.explained, color="grey", ls=":", label="on texts held out, at the end"
    )
    upper.set(ylabel="unexplained", yscale="log", title=title)
    upper.legend()
    middle.plot(rows, active, lw=0.8, color="C1")
    middle.set(ylabel="active on a token", ylim=(0, None))
    lower.plot(rows, dead, lw=0.8, color="C3")
    lower.set(ylabel="dead", xlabel="tokens seen", ylim=(0, None))
    save_figure(figure, path)
