"""What a causal tracing answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Finite
from steer.inspection.next_token import TokenChance
from steer.inspection.token_labels import place_label


class TracedCell(BaseModel):
    """The answer's probability with the clean state put back at one place, the mean over the draws
    of noise, and in each of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    position: int
    restored: Finite
    draws: tuple[Finite, ...]


class DisturbedChance(BaseModel):
    """The answer's probability with noise at some tokens: the mean over draws, and each of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positions: tuple[int, ...]
    probability: Finite
    draws: tuple[Finite, ...]


class TraceResult(BaseModel):
    """`cells` run over `positions` within each of `layers`.

    `clean` is the answer and its probability without noise, `known` whether the model says it
    first; `corrupted` that with noise at the subject; `elsewhere` the control, as much noise at as
    many other tokens, missing where there are none. `sigma` is the standard deviation of the
    prompt's embeddings, in the stream's own units, and the noise `noise` times as large.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.trace"] = "inspect.trace"
    model: str
    site: str
    window: int
    tokens: tuple[str, ...]
    clean: TokenChance
    known: bool
    sigma: Finite
    noise: Finite
    corrupted: DisturbedChance
    elsewhere: DisturbedChance | None = None
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    cells: tuple[TracedCell, ...]

    def row(self, layer: int) -> tuple[TracedCell, ...]:
        """The cells of one layer, in the order of `positions`."""
        place, width = self.layers.index(layer), len(self.positions)
        return self.cells[place * width : (place + 1) * width]


def trace_heat_map(result: TraceResult) -> HeatMap:
    """Layers × positions: the answer's probability with that state put back, from what the noise
    leaves of it to what it was."""
    rows = [result.row(layer) for layer in result.layers]
    values = [[cell.restored for cell in row] for row in rows]
    every = [value for row in values for value in row]
    low = min(result.corrupted.probability, *every, result.clean.probability)
    high = max(result.clean.probability, *every)
    noisy = frozenset(
        (row, column)
        for row in range(len(rows))
        for column, position in enumerate(result.positions)
        if position in result.corrupted.positions
    )
    return HeatMap(
        title=f"Causal trace of {result.clean.token!r}",
        subtitle=f"{result.model} · {result.site} · {result.clean.probability:.2f} clean, "
        f"{result.corrupted.probability:.2f} noisy",
        row_label="layer",
        column_label="prompt token",
        rows=[str(layer) for layer in result.layers],
        columns=[place_label(result.tokens, position) for position in result.positions],
        values=values,
        texts=[[f"{value:.2f}" for value in row] for row in values],
        scale="probability",
        limits=(low, high if high > low else low + 1e-9),
        marked=noisy,
    )
