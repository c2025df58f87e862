"""A vector trained so that added it brings an answer about, and removed it keeps it away.

RePS (2505.20809). Two sides are trained at once, on the same prompts:

    steer      x ← x + f·v                          prefers the chosen answer
    suppress   x ← x − ReLU(⟨v, x⟩)·v / ‖v‖²        prefers the rejected one

with the factor f drawn for every batch, so that the vector works at many strengths. What is stored
is v times the middle factor: strength 1 is in the middle of what was trained. `add` serves the
first side and `project` with mode `at_most` 0 the second. With the loss `lm` or `simpo` the vector
is trained to steer alone.

The paper's rate and start are lengths in the states of the Gemma models; the states of others are
a tenth as long, and what trains one tears the other. Here both are shares of the median state's
length, so that they mean the same in every model and layer.

Memory: v and Adam's two moments, 3·d per layer; and the graph of one batch of both answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple

import torch
from torch import Tensor, nn

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.errors import SteerError
from steer.fit.data.instruction import Placement
from steer.fit.data.preferences import PreferenceSet
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.methods.trained.preference import (
    LossName,
    PreferenceRow,
    asked_rows,
    preference_loss,
)
from steer.fit.methods.trained.training import check_training, train
from steer.fit.states import Progress, make_reading
from steer.model import HookPoint
from steer.spec import Site, Where

_BEGUN = 0.05
"""The share of the states' length that a vector has at first, at the middle strength."""
_READ = 8
"""Answers whose states are measured."""
FACTORS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0)


def fit_reps(
    engine: Engine,
    preferences: PreferenceSet,
    *,
    name: str,
    layers: Sequence[int],
    instruction: str | None = None,
    place: Placement = "system",
    loss: LossName = "reps",
    factors: Sequence[float] = FACTORS,
    site: Site = "resid_post",
    where: WhereName = "all",
    steps: int = 100,
    batch: int = 6,
    rate: float = 0.03,
    max_tokens: int = 48,
    seed: int = 0,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> ControlVector:
    """A vector under which the model prefers the chosen answers.

    Answers that `preferences` lack are the model's own, with and without `instruction` at
    `place`. AdamW over `steps` batches: the first moves what is added at the middle strength by
    `rate` of the median state's length, all layers together, and the last by nothing. `progress` is
    told of every answer that is asked for and of every step.

    Raises `Unsupported` (`no_gradients`) on an engine that cannot differentiate, `SteerError` for
    unusable arguments.
    """
    differentiable(engine)
    reading = make_reading(engine, site=site, layers=layers)
    default_where = where_named(where)
    check_training(steps, batch)
    if not factors or min(factors) <= 0:
        raise SteerError(
            f"factors are numbers above 0, at least one; got {list(factors)!r}",
            param="/factors",
            code="invalid_option",
        )
    rows = asked_rows(
        engine,
        preferences,
        instruction,
        place=place,
        loss=loss,
        max_tokens=max_tokens,
        batch=batch,
        progress=progress,
    )
    middle, generator = sum(factors) / len(factors), random.Random(seed)
    lengths = _median_lengths(engine, rows, reading.points)
    units = {point: length / (middle * len(lengths)) for point, length in lengths.items()}
    vectors = _started(engine, units, seed)
    losses = train(
        engine,
        rows,
        _loss(vectors, default_where, loss, lambda: generator.choice(list(factors))),
        torch.optim.AdamW(
            # Adam moves every channel by its rate.
            [
                {"params": [v], "lr": rate * units[point] / len(v) ** 0.5}
                for point, v in vectors.items()
            ],
            weight_decay=0.0,
        ),
        what=[
            "reps",
            [astuple(one) for one in rows],
            list(layers),
            loss,
            list(factors),
            site,
            where,
            rate,
        ],
        steps=steps,
        batch=batch,
        seed=seed,
        judged=_loss(vectors, default_where, loss, lambda: middle),
        drawn=lambda: generator.choice(list(factors)),
        progress=progress,
    )
    return ControlVector.of(
        {point.layer: middle * v.detach().cpu() for point, v in vectors.items()},
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=default_where,
        description=description,
        licence=licence,
        provenance={
            "method": "reps",
            "loss": loss,
            "data_sha256": preferences.sha256,
            "preferences": len(rows),
            **({} if instruction is None else {"instruction": instruction, "place": place}),
            "trained_strengths": [round(f / middle, 4) for f in (min(factors), max(factors))],
            "where": where,
            "steps": steps,
            "batch": batch,
            "rate": rate,
            "seed": seed,
            **losses.told(),
            **made_on(engine),
        },
    )


def _median_lengths(
    engine: Engine, rows: Sequence[PreferenceRow], points: Sequence[HookPoint]
) -> dict[HookPoint, float]:
    """The median length of the states of a few answers: the first token's, a hundred times as long
    in many models, does not count."""
    read = [row.chosen.fed for row in rows[:_READ]]

    def work(model: DifferentiableModel) -> dict[HookPoint, float]:
        with torch.no_grad():
            traced = model.run(read, edits={}, capture=points)
        kept = [(n, slice(len(fed))) for n, fed in enumerate(read)]
        return {
            point: float(torch.cat([states[place] for place in kept]).norm(dim=-1).median())
            for point, states in traced.states.items()
        }

    return differentiable(engine).differentiate(work)


def _started(
    engine: Engine, units: Mapping[HookPoint, float], seed: int
) -> dict[HookPoint, nn.Parameter]:
    """Random vectors of `_BEGUN` units, on the model's device."""
    device = differentiable(engine).differentiate(lambda model: model.device)
    generator = torch.Generator().manual_seed(seed)

    def row(point: HookPoint) -> Tensor:
        d = engine.info.width(point.site)
        length: float = _BEGUN * units[point] / math.sqrt(d)
        return torch.randn(d, generator=generator) * length

    return {point: nn.Parameter(row(point).to(device)) for point in units}


def _loss(
    vectors: Mapping[HookPoint, Tensor],
    where: Where | None,
    name: LossName,
    draw: Callable[[], float],
) -> Callable[[DifferentiableModel, list[PreferenceRow]], Tensor]:
    def loss(model: DifferentiableModel, rows: list[PreferenceRow]) -> Tensor:
        factor = draw()
        adds = {point: added(factor * v) for point, v in vectors.items()}
        steering = preference_loss(model, rows, adds, where, name)
        if name != "reps":
            return steering
        taken = {point: suppressed(v) for point, v in vectors.items()}
        turned = [row.turned() for row in rows]
        return (steering + preference_loss(model, turned, taken, where, name)) / 2

    return loss


def added(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """x + v, as `add` does it."""
    return lambda x: x.float() + vector


def suppressed(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """x − ReLU(⟨v, x⟩)·v/‖v‖², as `project` does it with `at_most` 0."""

    def edit(x: Tensor) -> Tensor:
        x = x.float()
        along = (x @ vector).relu() / vector.square().sum()
        return x - along[..., None] * vector

    return edit
