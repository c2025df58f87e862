"""Where steering works: every layer by every position, measured and drawn.

The direction of a cell is the shipped vector's at the cell's layer: a difference in means of the
states at the last prompt token. That is the vector a user has; it is not fitted again for other
positions, so a low cell says that this vector does not work there, not that none could. A cell's
strength is the best of a few on development prompts (the pairs' negatives, which the vectors
are fitted on); its number is of held-out prompts, on which nothing was chosen. Where no development
answer at any strength had the attribute and was valid, the held-out prompts are not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.library.bench import LAST, SAMPLING, Bench, add, where_json
from steer_vectors.demo.recipe.library.choosing import PLACES
from steer_vectors.demo.recipe.scorers import scorer

from steer.artefacts.control_vector import ControlVector
from steer.fit.data.pairs import Prompt, render
from steer.fit.measure.answers import Answer, answers_under, measured
from steer.spec import Where

POSITIONS = 8
WHOLE, FIRST, EVERY = "whole prompt", "first generated token", "every generated token"
ANSWER = "last prompt token and answer"
COLUMNS = (*(str(-n) for n in range(POSITIONS, 0, -1)), WHOLE, FIRST, EVERY, ANSWER)
DEV_PROMPTS = 12
FEW_TOKENS = (0.75, 1.25, 2.0)
MANY_TOKENS = (0.25, 0.45, 0.75)
SHADES = "Blues"
PANEL_COLUMNS = 2


class WhereCell(BaseModel):
    """The share of answers that have the attribute and are valid, and the strength; `share` is
    None where no development answer was such an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float | None
    strength: float


class WhereMap(BaseModel):
    """Cells `[layers][columns]` of one attribute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attribute: str
    prompts: int
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[WhereCell, ...], ...]


@dataclass(frozen=True)
class Trial:
    """One cell at one strength."""

    layer: int
    column: str
    strength: float


def tokens_of(column: str, prompt_length: int) -> Where:
    """The tokens that a column steers, for a prompt of `prompt_length` tokens."""
    if column == WHOLE:
        return Where(phases=("prompt",))
    if column == FIRST:
        return Where(positions=((prompt_length, prompt_length + 1),))
    if column == EVERY:
        return Where(phases=("generation",))
    if column == ANSWER:
        return PLACES[ANSWER]
    position = int(column)
    if position == -1:
        return LAST
    return Where(positions=((position, position + 1),))


def strengths_of(column: str) -> tuple[float, ...]:
    """The strengths that are tried: less where many tokens are steered."""
    return MANY_TOKENS if column in (EVERY, ANSWER) else FEW_TOKENS


def intervention(name: str, trial: Trial, prompt_length: int) -> dict[str, Any]:
    """Adding the vector `name` as `trial` says."""
    where = where_json(tokens_of(trial.column, prompt_length))
    return {**add(name), "layers": [trial.layer], "strength": trial.strength, "where": where}


def measure_where(
    bench: Bench,
    vector: ControlVector,
    development: Sequence[Prompt],
    prompts: int,
    progress: Callable[[int], None] | None = None,
) -> WhereMap:
    """All layers by all `COLUMNS`, on the first `prompts` held-out prompts that are long enough."""
    name, layers = vector.card.name, vector.card.layers
    held_out = long_enough(bench, bench.held_out(asked_of(name)))[:prompts]
    tried = long_enough(bench, development)[:DEV_PROMPTS]
    trials = [Trial(x, c, s) for x in layers for c in COLUMNS for s in strengths_of(c)]
    chosen: dict[tuple[int, str], tuple[float, Trial]] = {}
    # The smallest strength comes first and wins ties.
    for trial, share in zip(trials, _shares(bench, vector, trials, tried, progress), strict=True):
        cell = trial.layer, trial.column
        if cell not in chosen or share > chosen[cell][0]:
            chosen[cell] = share, trial
    hopeful = [trial for share, trial in chosen.values() if share > 0]
    shares = dict(zip(hopeful, _shares(bench, vector, hopeful, held_out, progress), strict=True))
    if progress is not None:
        progress((len(chosen) - len(hopeful)) * len(held_out))
    picked = {cell: trial for cell, (_, trial) in chosen.items()}
    return WhereMap(
        attribute=name,
        prompts=len(held_out),
        layers=layers,
        columns=COLUMNS,
        cells=tuple(
            tuple(
                WhereCell(share=shares.get(picked[x, c]), strength=picked[x, c].strength)
                for c in COLUMNS
            )
            for x in layers
        ),
    )


def answers_asked(layers: int, prompts: int) -> int:
    """How many answers `measure_where` counts as done, at most."""
    trials = sum(len(strengths_of(column)) for column in COLUMNS)
    return layers * (trials * DEV_PROMPTS + len(COLUMNS) * prompts)


def long_enough(bench: Bench, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts in which every position of `COLUMNS` is a token of its own."""
    return [one for one in prompts if len(render(bench.engine.tokenizer, one)) >= POSITIONS]


def _shares(
    bench: Bench,
    vector: ControlVector,
    trials: Sequence[Trial],
    prompts: Sequence[Prompt],
    progress: Callable[[int], None] | None,
) -> list[float]:
    """For each trial the share of answers that have the attribute and are valid."""
    by_length: dict[int, list[Prompt]] = {}
    for one in prompts:
        by_length.setdefault(len(render(bench.engine.tokenizer, one)), []).append(one)
    jobs = []
    for number, trial in enumerate(trials):
        # Only the first generated token needs the prompt's length; the rest share one plan.
        groups = by_length.items() if trial.column == FIRST else [(0, list(prompts))]
        for length, asked in groups:
            plan = bench.plan(vector, intervention(vector.card.name, trial, length))
            jobs.append((number, plan, asked))
    found = answers_under(
        bench.engine,
        [asked for _, _, asked in jobs],
        [plan for _, plan, _ in jobs],
        scorer(vector.card.name),
        sampling=SAMPLING,
        progress=progress,
    )
    answers: list[list[Answer]] = [[] for _ in trials]
    for (number, _, _), some in zip(jobs, found, strict=True):
        answers[number].extend(some)
    return [measured(one).both or 0.0 for one in answers]


def draw_where(maps: Sequence[WhereMap]) -> Figure:
    """A heat map for each attribute, layer 0 at the bottom, one colour scale."""
    rows = -(-len(maps) // PANEL_COLUMNS)
    figure = Figure(figsize=(6.2 * PANEL_COLUMNS, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, PANEL_COLUMNS, squeeze=False).ravel()
    for axis, one in zip(axes, maps, strict=False):
        image = _draw_map(axis, one)
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    figure.colorbar(
        image, ax=list(axes), shrink=0.5, label="answers that have the attribute and are valid"
    )
    return figure


def _draw_map(axis: Any, one: WhereMap) -> Any:
    shares = [[cell.share or 0.0 for cell in row] for row in one.cells]
    image = axis.imshow(shares, cmap=SHADES, vmin=0, vmax=1, origin="lower", aspect="auto")
    for y, row in enumerate(one.cells):
        for x, cell in enumerate(row):
            text = "·" if cell.share is None else f"{cell.share:.2f}".removeprefix("0")
            ink = "white" if (cell.share or 0.0) > 0.6 else "#1f2933"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(one.columns)), [_folded(c) for c in one.columns], fontsize=7)
    axis.set_yticks(range(len(one.layers)), [str(layer) for layer in one.layers], fontsize=8)
    axis.axvline(POSITIONS - 0.5, color="white", lw=3)
    axis.set_ylabel("layer", fontsize=8)
    axis.set_title(one.attribute, fontsize=10, loc="left", weight="bold")
    axis.set_title(f"{one.prompts} held-out prompts", fontsize=7, loc="right")
    return image


def _folded(column: str) -> str:
    short = {ANSWER: "last +\nanswer", FIRST: "first\nanswer\ntoken", EVERY: "whole\nanswer"}
    return short.get(column, column.replace(" ", "\n"))
