"""Dose and response of the demo's vectors, a panel for each: measured and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.library.bench import SAMPLING, Bench, add, where_json
from steer_vectors.demo.recipe.library.choosing import PLACES
from steer_vectors.demo.recipe.scorers import scorer

from steer.artefacts.control_vector import ControlVector
from steer.fit.measure.answers import answers_under, measured
from steer.spec import Where

STEPS = 8
COLUMNS = 4
_GREY = "#7b8794"
_CURVES = (("success", "C0", "o-"), ("valid", "C1", "s--"), ("success_and_valid", "C2", "^-"))


class DosePoint(BaseModel):
    """Shares of answers at one strength, and −log p of their tokens above that of the unsteered
    ones, in nats per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: float
    success: float
    valid: float
    success_and_valid: float
    nats_more_loss: float


class DosePanel(BaseModel):
    """A vector at its card's layers and place; the first point is the unsteered model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attribute: str
    layers: tuple[int, ...]
    place: str
    default: float
    prompts: int
    points: tuple[DosePoint, ...]


def wilson(share: float, answers: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    found = binomtest(round(share * answers), answers).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def measure_dose(
    bench: Bench,
    vector: ControlVector,
    prompts: int,
    progress: Callable[[int], None] | None = None,
) -> DosePanel:
    """The first `prompts` held-out prompts, unsteered and at `STEPS` strengths up to twice the
    card's default."""
    card = vector.card
    strengths = [card.default_strength * 2 * step / STEPS for step in range(1, STEPS + 1)]
    plans = [None, *(bench.plan(vector, {**add(card.name), "strength": s}) for s in strengths)]
    asked = bench.held_out(asked_of(card.name))[:prompts]
    answers = answers_under(
        bench.engine,
        [asked] * len(plans),
        plans,
        scorer(card.name),
        sampling=SAMPLING,
        progress=progress,
    )
    found = [measured(one) for one in answers]
    return DosePanel(
        attribute=card.name,
        layers=card.used_layers,
        place=place_name(card.default_where),
        default=card.default_strength,
        prompts=len(asked),
        points=tuple(
            DosePoint(
                strength=strength,
                success=one.score,
                valid=one.valid or 0.0,
                success_and_valid=one.both or 0.0,
                nats_more_loss=one.loss - found[0].loss,
            )
            for strength, one in zip([0.0, *strengths], found, strict=True)
        ),
    )


def place_name(where: Where | None) -> str:
    """The name of a card's place, or the place itself where it is none of `PLACES`."""
    if where is None:
        return "every token"
    names = [name for name, place in PLACES.items() if place == where]
    return names[0] if names else json.dumps(where_json(where))


def draw_dose(panels: Sequence[DosePanel]) -> Figure:
    """A panel for each attribute: shares with their bands above, nats of extra loss below."""
    rows = math.ceil((len(panels) + 1) / COLUMNS)  # one place is for the legend
    # A Figure of its own, without pyplot: nothing global, no window.
    figure = Figure(figsize=(2.9 * COLUMNS, 2.75 * rows), layout="constrained")
    parts = figure.subfigures(rows, COLUMNS, squeeze=False).ravel()
    for part, panel in zip(parts, panels, strict=False):
        _draw_panel(part, panel)
    upper = parts[0].axes[0]
    handles, labels = upper.get_legend_handles_labels()
    parts[len(panels)].legend(
        handles,
        labels,
        loc="center",
        frameon=False,
        title=f"{min(panel.prompts for panel in panels)} held-out prompts;\nbands: 95 % (Wilson)",
    )
    return figure


def _draw_panel(part: Any, panel: DosePanel) -> None:
    upper, lower = part.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    strengths = [point.strength for point in panel.points]
    for name, colour, style in _CURVES:
        shares = [getattr(point, name) for point in panel.points]
        low, high = zip(*(wilson(share, panel.prompts) for share in shares), strict=True)
        upper.fill_between(strengths, low, high, color=colour, alpha=0.15, lw=0)
        upper.plot(strengths, shares, style, color=colour, ms=3, lw=1.3, label=_label(name))
    lower.plot(strengths, [p.nats_more_loss for p in panel.points], "o-", color="C3", ms=2, lw=1)
    lower.axhline(0, color="grey", ls=":", lw=0.8)
    for axis in (upper, lower):
        axis.axvline(panel.default, color=_GREY, ls="--", lw=1, label="the card's strength")
        axis.tick_params(labelsize=7)
    upper.set(ylim=(-0.03, 1.03), xlim=(0, strengths[-1]))
    lower.set_ylabel("nats", fontsize=7)
    layers = ", ".join(str(layer) for layer in panel.layers)
    upper.set_title(panel.attribute, fontsize=10, loc="left", weight="bold")
    part.supxlabel(f"strength, layer {layers}; {panel.place}", fontsize=7)


def _label(name: str) -> str:
    return name.replace("_", " ")
