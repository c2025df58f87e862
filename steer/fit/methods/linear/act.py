"""Optimal transport of each channel by itself (Linear-AcT and Mean-AcT, 2410.23054).

    x ← ω·x + β   for each channel, inside the range that its source states have

Between two samples of one number the cheapest transport pairs them in order: with a and b the
sorted states of a channel from the negative and the positive prompts, ω = Σãb̃/Σã² (centred) and
β = m_b − ω·m_a are the least-squares line through those pairs. The form `mean` moves every channel
by m_b − m_a, which is an addition.

A layer is fitted with the edits of the layers before it on, so that it does only what is left to
do. Memory: the positive prompts' states, n·layers·d, and the negative ones' of one layer, n·d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.pairs import PairSet
from steer.fit.data.prompt import Positions, Prompt, positions_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.states import Progress, Reading, make_reading, read_rows
from steer.plan.plan import SteeringPlan
from steer.spec import Site, parse_spec

ActForm: TypeAlias = Literal["linear", "mean"]


def fit_act(
    engine: Engine,
    pairs: PairSet,
    *,
    name: str,
    layers: Sequence[int],
    transport: ActForm = "linear",
    support: bool = True,
    site: Site = "resid_post",
    positions: Positions = "mean",
    where: WhereName = "all",
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> AffineMap | ControlVector:
    """A map of the negative prompts' states onto the positive ones', channel by channel and layer
    by layer: an `AffineMap`, or where `transport` is `mean` a `ControlVector` to add.

    Strength 1 moves all the way. With `support` a channel is moved only where its value is one
    that negative prompts have. The prompts need not be in pairs. `progress` is told of every pair
    on each layer. Raises `SteerError`.
    """
    if len(pairs) < 2:
        raise SteerError(f"{len(pairs)} pairs have no spread: give at least 2", code="no_pairs")
    reading = make_reading(engine, site=site, layers=layers, positions=positions, batch=batch)
    default_where = where_named(where)
    positive = [pair.positive for pair in pairs.items]
    negative = [pair.negative for pair in pairs.items]
    targets = _rows(engine, positive, reading, None, None)
    found: dict[int, Channels] = {}
    card: dict[str, Any] = {"site": site, "default_where": default_where}
    for layer in reading.layers:
        plan = _plan(engine, found, transport, card)
        states = _rows(engine, negative, replace(reading, layers=(layer,)), plan, progress)
        found[layer] = channel_map(states[layer], targets[layer], transport, support)
    return _artefact(
        found,
        transport,
        {
            **card,
            "name": name,
            "model": engine.info.own_name,
            "description": description,
            "licence": licence,
            "provenance": {
                "method": f"{transport}-act",
                "data_sha256": pairs.sha256,
                "pairs": len(pairs),
                "positions": positions_json(positions),
                "support": support and transport == "linear",
                **made_on(engine),
            },
        },
    )


def channel_map(source: Tensor, target: Tensor, form: ActForm, support: bool) -> Channels:
    """The map of each channel of `source` onto that of `target`, `[n, d]` each.

    A channel that does not vary is moved by the difference of the means.
    """
    a, b = source.double().sort(0).values, target.double().sort(0).values
    mean_a, mean_b = a.mean(0), b.mean(0)
    if form == "mean":
        return Channels(torch.ones_like(mean_a), mean_b - mean_a)
    spread = (a - mean_a).square().sum(0)
    shared = ((a - mean_a) * (b - mean_b)).sum(0)
    flat = spread <= 1e-12 * (mean_a.square() * len(a)).clamp_min(1e-30)
    scale = torch.where(flat, 1.0, shared / spread.clamp_min(1e-300))
    bounds = (a[0], a[-1]) if support else (None, None)
    return Channels(scale, mean_b - scale * mean_a, *bounds)


def _artefact(
    found: Mapping[int, Channels], form: ActForm, card: dict[str, Any]
) -> AffineMap | ControlVector:
    if form == "linear":
        return AffineMap.of(found, **card)
    shifts = {layer: one.shift for layer, one in found.items() if bool(one.shift.any())}
    if not shifts:
        raise SteerError(
            "the positive and the negative prompts have the same states on every layer asked for: "
            "check that the pairs differ, and read a later layer or site",
            code="no_difference",
        )
    return ControlVector.of(shifts, **card)


def _plan(
    engine: Engine, found: Mapping[int, Channels], form: ActForm, card: dict[str, Any]
) -> SteeringPlan | None:
    """The edits of the layers before; none on the first, or where nothing had to be moved."""
    if not any(bool((one.shift != 0).any() or (one.scale != 1).any()) for one in found.values()):
        return None
    before = _artefact(found, form, card)
    if isinstance(before, AffineMap):
        library, item = MemoryLibrary(maps={"before": before}), {"kind": "affine", "map": "before"}
    else:
        library = MemoryLibrary(vectors={"before": before})
        item = {"kind": "add", "vector": "before"}
    return plans_of(engine, library).plan(parse_spec({"interventions": [item]}))


def _rows(
    engine: Engine,
    prompts: Sequence[Prompt],
    reading: Reading,
    plan: SteeringPlan | None,
    progress: Progress | None,
) -> dict[int, Tensor]:
    """One state for each prompt, `[n, d]` per layer."""
    parts = []
    for first in range(0, len(prompts), reading.batch):
        group = prompts[first : first + reading.batch]
        parts.append(read_rows(engine, group, reading, plan))
        if progress is not None:
            progress(len(group))
    return {layer: torch.cat([part[layer] for part in parts]) for layer in reading.layers}
