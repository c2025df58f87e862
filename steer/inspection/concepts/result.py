"""What a vector-symbolic probe answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.artefacts.concepts.form import RoleAccuracy
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Finite
from steer.inspection.token_labels import token_label


class ReadFiller(BaseModel):
    """A filler, and the cosine of its code with what the role unbinds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filler: str
    cosine: Finite


class RoleReading(BaseModel):
    """The likeliest fillers of a role, best first; `found` says whether the first one counts: its
    cosine is above the threshold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    found: bool
    fillers: tuple[ReadFiller, ...]


class PromptReading(BaseModel):
    """What is read of one prompt at one token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    position: int
    roles: tuple[RoleReading, ...]


class ConceptsResult(BaseModel):
    """`trained` texts taught the probe, `held_out` others tried it; `accuracy`, `shuffled` and
    `commonest` are over all their pairs (see `RoleAccuracy`). `readings` are in the order of the
    prompts; the probe that reads them is that which was tried. `random` is the greatest cosine that
    one of so many random codes has by chance, about. `probe` is a registered one, as `name@hash`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.concepts"] = "inspect.concepts"
    model: str
    probe: str | None = None
    layers: tuple[int, ...]
    dimensions: int
    fillers: int
    trained: int | None = None
    held_out: int | None = None
    accuracy: Finite | None = None
    shuffled: Finite | None = None
    commonest: Finite | None = None
    random: Finite
    roles: tuple[RoleAccuracy, ...]
    readings: tuple[PromptReading, ...] = ()


def concepts_heat_map(result: ConceptsResult) -> HeatMap:
    """Prompts by roles, each with the filler that is read; without prompts how well held-out texts
    are read."""
    names = [one.role for one in result.roles]
    if result.readings:
        # A card need not say how its probe does, and has no roles then.
        names = [one.role for one in result.readings[0].roles]
        rows = [f"{n} {token_label(one.token)}" for n, one in enumerate(result.readings)]
        cells = [one.roles for one in result.readings]
        values = [[cell.fillers[0].cosine for cell in row] for row in cells]
        texts = [[cell.fillers[0].filler if cell.found else "–" for cell in row] for row in cells]
        label, scale = "prompt", "cosine"
    else:
        rows = ["commonest", "shuffled", "probe"]
        found = [(one.commonest, one.shuffled, one.accuracy) for one in result.roles]
        values = [[one[n] or 0.0 for one in found] for n in range(3)]
        texts = [
            ["" if value is None else f"{value:.2f}" for value in (one[n] for one in found)]
            for n in range(3)
        ]
        label, scale = "", "share right"
    tried = "not tried" if result.accuracy is None else f"{result.accuracy:.2f} right"
    if result.shuffled is not None:
        tried += f", {result.shuffled:.2f} with shuffled labels"
    return HeatMap(
        title=f"{len(names)} roles, {result.fillers} fillers",
        subtitle=f"{result.model} · layers {result.layers[0]} to {result.layers[-1]} · {tried}",
        row_label=label,
        column_label="role",
        rows=rows,
        columns=names,
        values=values,
        texts=texts,
        scale=scale,
    )
