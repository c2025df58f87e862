"""`compose: "orthogonal"`: added directions without their overlap.

At each hook point the directions that a spec adds become orthogonal to each other, and keep their
lengths: of all orthonormal sets the one nearest to theirs (Löwdin's symmetric orthogonalisation,
the polar factor of their unit rows). No direction comes first, the span stays the same, and
directions that are orthogonal already stay as they are. Adding one of them then does not move a
state along the others (subspaces per concept: 2406.18534).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steer.errors import SpecError
from steer.model import HookPoint
from steer.plan.points import row
from steer.plan.resolve import Resolved
from steer.spec import Add, Site

MOST_PARALLEL = 0.99
_ORTHOGONAL = 1e-6


def orthogonalised(rows: Tensor) -> Tensor:
    """`rows` `[n, d]` without overlap, each as long as it was; as they are if they have none.

    Raises `SpecError` (`not_composable`) where they are nearly dependent: for two rows, where their
    cosine is beyond ±.99.
    """
    lengths = rows.double().norm(dim=1, keepdim=True)
    unit = rows.double() / lengths
    overlap = unit @ unit.T - torch.eye(len(rows), dtype=torch.float64)
    if bool(overlap.abs().max() <= _ORTHOGONAL):
        return rows
    if len(rows) > rows.shape[1] or torch.linalg.svdvals(unit)[-1] ** 2 < 1 - MOST_PARALLEL:
        raise SpecError(
            "the vectors to compose are nearly parallel, so that without their overlap nothing is "
            "left to tell them apart: add fewer of them, or leave out 'compose'",
            code="not_composable",
            param="/compose",
        )
    u, _, v = torch.linalg.svd(unit, full_matrices=False)
    found: Tensor = (u @ v * lengths).to(rows.dtype)
    return found


def compose(resolved: Sequence[Resolved]) -> list[Resolved]:
    """`resolved` with the composed form of every vector that is added.

    All additions count, whichever tokens they act on; a vector that is added twice counts once.
    Raises `SpecError` (`not_composable`).
    """
    rows: dict[HookPoint, dict[str, Tensor]] = {}
    for one in resolved:
        if isinstance(one.item, Add):
            vector = one.vector("vector")
            for point in one.points:
                rows.setdefault(point, {})[vector.sha256] = row(vector, point.layer)
    directions: dict[tuple[str, Site], dict[int, Tensor]] = {}
    for point, mine in rows.items():
        found = orthogonalised(torch.stack(list(mine.values())))
        for sha256, direction in zip(mine, found, strict=True):
            directions.setdefault((sha256, point.site), {})[point.layer] = direction
    return [_composed(one, directions) for one in resolved]


def _composed(
    one: Resolved, directions: Mapping[tuple[str, Site], Mapping[int, Tensor]]
) -> Resolved:
    if not isinstance(one.item, Add):
        return one
    vector = one.vector("vector")
    mine = directions[vector.sha256, one.points[0].site]
    return replace(one, composed=replace(vector, directions=mine))
