"""The dose-response of a sweep as a picture."""

from __future__ import annotations

from pathlib import Path

from steer.errors import SteerError
from steer.fit.sweep import DoseResponse


def plot_dose_response(response: DoseResponse, path: Path, *, title: str) -> None:
    """Writes a picture (PNG, or what the suffix says): score and validity over strength, and the
    perplexity ratio below. Raises `SteerError` where it cannot be written."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow import)

    # A Figure of its own, without pyplot: nothing global, no window.
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SteerError(
            f"the plot {str(path)!r} cannot be written: {error}", code="not_written"
        ) from error
