"""The plane in which states are turned (Angular Steering, 2510.26243).

Each layer's difference of means is a candidate. The first axis is the best of them, the one that
tells held-out prompts apart best; the second is the first principal component of all candidates,
centred and made orthogonal to the first. Both are unit vectors and the same on every layer: the
kind `rotate` in mode `to` turns what a state has in the plane to an angle from the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.pairs import PairSet
from steer.fit.data.prompt import Positions
from steer.fit.data.where import WhereName
from steer.fit.methods.card import best_layers
from steer.fit.methods.fitting import fit
from steer.fit.states import Progress
from steer.spec import Site


def fit_angular(
    engine: Engine,
    pairs: PairSet,
    *,
    name: str,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    where: WhereName = "all",
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> tuple[ControlVector, ControlVector]:
    """The axes NAME and NAME-toward of the plane in which `pairs` differ.

    Arguments and errors are those of `fit`; two layers or more have to tell the prompts apart.
    """
    candidates = fit(
        engine,
        pairs,
        name=name,
        site=site,
        layers=layers,
        positions=positions,
        where=where,
        held_out=held_out,
        seed=seed,
        batch=batch,
        description=description,
        licence=licence,
        progress=progress,
    )
    chosen = best_layers(candidates.card.measures, 1)[0]
    first, second = plane(candidates.directions, chosen)
    made = {**candidates.card.provenance, "method": "angular", "best_layer": chosen}
    shared: dict[str, Any] = {
        key: getattr(candidates.card, key)
        for key in ("model", "site", "default_where", "description", "licence")
    }
    return (
        _axis(first, candidates, name, {**made, "axis": "first"}, shared),
        _axis(second, candidates, f"{name}-toward", {**made, "axis": "second"}, shared),
    )


def plane(candidates: Mapping[int, Tensor], best: int) -> tuple[Tensor, Tensor]:
    """Two orthonormal axes `[d]` from a candidate for each layer; float64.

    The second points where its largest entry is positive: a principal component has no sign.
    Raises `SteerError` for candidates that do not span a plane.
    """
    rows = torch.stack([normalize(row.double(), dim=0) for row in candidates.values()])
    first = normalize(candidates[best].double(), dim=0)
    centred = rows - rows.mean(0)
    component = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    rest = component - (component @ first) * first
    if len(rows) < 2 or centred.norm() < 1e-6 or rest.norm() < 1e-6:
        raise SteerError(
            f"the differences on layers {sorted(candidates)} do not span a plane: give at least "
            "two layers on which the prompts differ in other ways",
            code="no_plane",
        )
    second = normalize(rest, dim=0)
    return first, second * second[second.abs().argmax()].sign()


def _axis(
    row: Tensor, of: ControlVector, name: str, provenance: dict[str, Any], card: dict[str, Any]
) -> ControlVector:
    rows = dict.fromkeys(of.directions, row)
    return ControlVector.of(rows, name=name, provenance=provenance, **card)
