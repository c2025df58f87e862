"""A vector on a few tokens of the prompt, trained together with its strength.

PrOSV (2605.05983): x ← x + α·v on the first p and the last s tokens of the prompt, and nothing on
what is generated, which is read as the model itself reads it. α and v are trained at once, with
rates by which a step changes each of them by the same share whatever the width n:

    v₀ ~ N(0, λ/n),  α₀ = β√n,  rate(v) = rate·√(λ/n),  rate(α) = rate·β√n

so that no strength has to be searched for: what is stored is α·v, and strength 1 is what was
trained. Memory: as for `reps`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.errors import SteerError
from steer.fit.data.instruction import Placement
from steer.fit.data.preferences import PreferenceSet
from steer.fit.methods.card import made_on
from steer.fit.methods.trained.preference import (
    PreferenceRow,
    asked_rows,
    preference_loss,
)
from steer.fit.methods.trained.reps import added
from steer.fit.methods.trained.training import check_training, train
from steer.fit.states import Progress, make_reading
from steer.model import HookPoint
from steer.spec import Site, Where

ProSVLoss: TypeAlias = Literal["simpo", "lm"]


class ScaledVector(nn.Module):
    """α·v for one layer of width n, with β and λ as above."""

    def __init__(self, width: int, beta: float, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        scale = (spread / width) ** 0.5
        self.vector = nn.Parameter(scale * torch.randn(width, generator=generator))
        self.factor = nn.Parameter(torch.tensor(beta * width**0.5))

    def product(self) -> Tensor:
        """`[d]`."""
        found: Tensor = self.factor * self.vector
        return found


def fit_prosv(
    engine: Engine,
    preferences: PreferenceSet,
    *,
    name: str,
    layers: Sequence[int],
    instruction: str | None = None,
    place: Placement = "system",
    loss: ProSVLoss = "simpo",
    first: int = 4,
    last: int = 4,
    beta: float = 1.0,
    spread: float = 1.0,
    site: Site = "resid_post",
    steps: int = 100,
    batch: int = 6,
    rate: float = 0.05,
    max_tokens: int = 48,
    seed: int = 0,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> ControlVector:
    """A vector for the `first` and the `last` tokens of a prompt, under which the model prefers the
    chosen answers; its card says those tokens.

    `beta` is β and `spread` λ. Other arguments, `progress` and errors as for `fit_reps`.
    """
    differentiable(engine)
    reading = make_reading(engine, site=site, layers=layers)
    where = prompt_ends(first, last)
    check_training(steps, batch)
    if beta <= 0 or spread <= 0:
        raise SteerError(
            f"beta ({beta!r}) and spread ({spread!r}) must be above 0", code="invalid_option"
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
    generator = torch.Generator().manual_seed(seed)
    width = engine.info.width(site)
    device = differentiable(engine).differentiate(lambda model: model.device)
    scaled = {p: ScaledVector(width, beta, spread, generator).to(device) for p in reading.points}
    losses = train(
        engine,
        rows,
        _loss(scaled, where, loss),
        _optimiser(scaled.values(), width, beta, spread, rate),
        what=[
            *("prosv", [astuple(one) for one in rows], list(layers), loss),
            *(first, last, beta, spread, site, rate),
        ],
        steps=steps,
        batch=batch,
        seed=seed,
        progress=progress,
    )
    return ControlVector.of(
        {point.layer: one.product().detach().cpu() for point, one in scaled.items()},
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=where,
        description=description,
        licence=licence,
        provenance={
            "method": "prosv",
            "loss": loss,
            "data_sha256": preferences.sha256,
            "preferences": len(rows),
            **({} if instruction is None else {"instruction": instruction, "place": place}),
            "first": first,
            "last": last,
            "beta": beta,
            "spread": spread,
            "factors": {str(p.layer): round(one.factor.item(), 4) for p, one in scaled.items()},
            "steps": steps,
            "batch": batch,
            "rate": rate,
            "seed": seed,
            **losses.told(),
            **made_on(engine),
        },
    )


def prompt_ends(first: int, last: int) -> Where:
    """The `first` and the `last` tokens of the prompt, none generated. Raises `SteerError`."""
    if first < 0 or last < 0 or first + last == 0:
        raise SteerError(
            f"first ({first!r}) and last ({last!r}) are numbers of tokens, at least one of them "
            "above 0",
            code="invalid_option",
        )
    ranges = ([(0, first)] if first else []) + ([(-last, None)] if last else [])
    return Where(phases=("prompt",), positions=tuple(ranges))


def _optimiser(
    scaled: Collection[ScaledVector], width: int, beta: float, spread: float, rate: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": [one.vector for one in scaled], "lr": rate * (spread / width) ** 0.5},
            {"params": [one.factor for one in scaled], "lr": rate * beta * width**0.5},
        ],
        weight_decay=0.0,
    )


def _loss(
    scaled: Mapping[HookPoint, ScaledVector], where: Where, name: ProSVLoss
) -> Callable[[DifferentiableModel, list[PreferenceRow]], Tensor]:
    def loss(model: DifferentiableModel, rows: list[PreferenceRow]) -> Tensor:
        edits = {point: added(one.product()) for point, one in scaled.items()}
        return preference_loss(model, rows, edits, where, name)

    return loss
