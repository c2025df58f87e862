"""From contrastive prompts to a control vector with its card.

Two passes over the data, each in batches through `engine.capture`: one that fits a direction per
layer, one over held-out pairs that measures it. Memory is bounded by one batch of states,
2 · batch · tokens · layers · d floats (tokens is 1 unless positions are "mean"), plus what the
method holds per layer: d numbers for `diffmean`, min(pairs, 3d)·d for `pca`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from steer.control_vector import ControlVector, LayerMeasure
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SteerError
from steer.fit.method import METHODS, Method
from steer.fit.pairs import Pair, PairSet, render
from steer.fit.separation import Separation
from steer.model_info import HookPoint
from steer.spec import Site, Where

Positions: TypeAlias = Literal["last", "mean"]
WhereName: TypeAlias = Literal["last", "generation", "all"]
Progress: TypeAlias = Callable[[int], None]
PairStates: TypeAlias = Mapping[int, tuple[Tensor, Tensor]]

WHERES: Mapping[str, Where | None] = {
    "last": Where(positions=((-1, None),), phases=("prompt",)),
    "generation": Where(phases=("generation",)),
    "all": None,
}
"""Where a fitted vector acts unless a request says otherwise: on the last prompt token, on what is
generated, or on every token."""

MIN_HELD_OUT = 4


@dataclass(frozen=True)
class Reading:
    """Which states are compared: hook points of one site, at which tokens, in which batches."""

    site: Site
    layers: tuple[int, ...]
    positions: Positions
    batch: int


@dataclass(frozen=True)
class Split:
    """Pairs to fit on, and pairs to measure on: the same ones where there are too few."""

    fitted: tuple[Pair, ...]
    measured: tuple[Pair, ...]

    @property
    def held_out(self) -> int:
        return 0 if self.measured == self.fitted else len(self.measured)


def fit(
    engine: Engine,
    pairs: PairSet,
    *,
    name: str,
    method: str = "diffmean",
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    where: WhereName = "last",
    held_out: float = 0.2,
    seed: int = 0,
    best: int = 1,
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> ControlVector:
    """A vector that points from the negative prompts' states to the positive ones'.

    States are read at the last prompt token, or averaged over the prompt (`positions`). A share
    `held_out` of the pairs, drawn with `seed`, only measures; the `best` layers by separation on
    them become the card's default layers. `progress` is told of every pair that was read.

    Raises `SteerError` for unusable arguments and where no layer tells the prompts apart.
    """
    chosen = tuple(range(engine.info.n_layers)) if layers is None else tuple(sorted(set(layers)))
    _check(pairs, method, held_out, best, batch)
    for layer in chosen:
        engine.info.check_point(HookPoint(layer, site))
    reading = Reading(site, chosen, positions, batch)
    split = split_pairs(pairs.items, held_out, seed)
    directions = _directions(engine, reading, split.fitted, METHODS[method], progress)
    measures = _measures(engine, reading, split.measured, directions, progress)
    return ControlVector.of(
        directions,
        name=name,
        model=engine.info.name,
        site=site,
        default_layers=best_layers(measures, best),
        default_where=WHERES[where],
        description=description,
        licence=licence,
        measures=measures,
        provenance={
            "method": method,
            "data_sha256": pairs.sha256,
            "pairs": len(pairs),
            "held_out_pairs": split.held_out,
            "positions": positions,
            "seed": seed,
            "model": engine.info.name,
            "architecture": engine.info.architecture,
        },
    )


def split_pairs(pairs: Sequence[Pair], share: float, seed: int) -> Split:
    """Draws `share` of the pairs for measuring, in a seeded order.

    With fewer than four to measure on, a variance says little: then all pairs do both.
    """
    order = list(pairs)
    random.Random(seed).shuffle(order)
    measured = round(len(order) * share)
    if measured < MIN_HELD_OUT:
        return Split(tuple(order), tuple(order))
    return Split(tuple(order[measured:]), tuple(order[:measured]))


def best_layers(measures: Mapping[int, LayerMeasure], count: int) -> tuple[int, ...]:
    """The `count` layers with the greatest separation, in order; the earlier one on a tie."""
    ranked = sorted(measures, key=lambda n: (-(measures[n].separation or 0.0), n))
    return tuple(sorted(ranked[:count]))


def _directions(
    engine: Engine,
    reading: Reading,
    pairs: Sequence[Pair],
    method: type[Method],
    progress: Progress | None,
) -> dict[int, Tensor]:
    width = engine.info.width(reading.site)
    methods = {layer: method(width) for layer in reading.layers}
    for states in read_states(engine, reading, pairs, progress):
        for layer, (positive, negative) in states.items():
            methods[layer].add(positive, negative)
    found = {layer: one.direction() for layer, one in methods.items()}
    # Before the first attention the last token knows nothing of the prompt: no direction there.
    usable = {layer: row for layer, row in found.items() if bool(row.any())}
    if not usable:
        raise SteerError(
            "the positive and the negative prompts have the same states on every layer asked for: "
            "check that the pairs differ, and read a later layer or site",
            code="no_difference",
        )
    return usable


def _measures(
    engine: Engine,
    reading: Reading,
    pairs: Sequence[Pair],
    directions: Mapping[int, Tensor],
    progress: Progress | None,
) -> dict[int, LayerMeasure]:
    separations = {layer: Separation(row) for layer, row in directions.items()}
    for states in read_states(engine, reading, pairs, progress):
        for layer, separation in separations.items():
            separation.add(*states[layer])
    return {layer: separation.measure() for layer, separation in separations.items()}


def read_states(
    engine: Engine, reading: Reading, pairs: Sequence[Pair], progress: Progress | None
) -> Iterator[PairStates]:
    """For each batch of pairs and each layer, the positive and negative states `[n, d]`."""
    points = tuple(HookPoint(layer, reading.site) for layer in reading.layers)
    for first in range(0, len(pairs), reading.batch):
        group = pairs[first : first + reading.batch]
        prompts = [_tokens(engine, pair.positive) for pair in group]
        prompts += [_tokens(engine, pair.negative) for pair in group]
        wanted = (-1,) if reading.positions == "last" else None
        captured = engine.capture(CaptureRequest(prompts, points, positions=wanted))
        stacked = {
            point.layer: torch.stack([one.states[point].mean(0) for one in captured])
            for point in points
        }
        yield {n: (rows[: len(group)], rows[len(group) :]) for n, rows in stacked.items()}
        if progress is not None:
            progress(len(group))


def _tokens(engine: Engine, prompt: Any) -> list[int]:
    tokens = render(engine.tokenizer, prompt)
    if not 0 < len(tokens) <= engine.info.max_length:
        raise SteerError(
            f"a prompt has {len(tokens)} tokens and the context {engine.info.max_length}: "
            f"shorten {str(prompt)[:60]!r}",
            code="context_length_exceeded",
        )
    return tokens


def _check(pairs: PairSet, method: str, held_out: float, best: int, batch: int) -> None:
    if method not in METHODS:
        raise SteerError(
            f"there is no method {method!r}: use one of {', '.join(METHODS)}",
            code="unknown_method",
        )
    if len(pairs) < 2:
        raise SteerError(
            f"{len(pairs)} pairs cannot be told from chance: give at least 2", code="no_pairs"
        )
    if not 0 <= held_out <= 0.9:
        raise SteerError(
            f"held_out is a share between 0 and 0.9; got {held_out!r}", code="invalid_option"
        )
    if best < 1 or batch < 1:
        raise SteerError(
            f"best ({best!r}) and batch ({batch!r}) must be at least 1", code="invalid_option"
        )
