"""`compose: "orthogonal"`: directions without their overlap.

At each hook point the directions that a spec adds become orthogonal to each other, and keep their
lengths: of all orthonormal sets the one nearest to theirs (Löwdin's symmetric orthogonalisation,
the polar factor of their unit rows). No direction comes first, the span stays the same, and
directions that are orthogonal already stay as they are. Adding one of them then does not move a
state along the others (subspaces per concept: 2406.18534).

The directions that a spec ablates become so too: one after the other then takes away all that they
span, where of overlapping ones the second would leave a part of the first. Other kinds, and what is
added to what is ablated at the same hook point, have no such form, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from steer.errors import SpecError
from steer.model import HookPoint
from steer.plan.points import row
from steer.plan.resolve import Resolved
from steer.spec import Ablate, Add, Site

MOST_PARALLEL = 0.99
_ORTHOGONAL = 1e-6
_COMPOSED = (Add, Ablate)


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
        raise _not_composable(
            "the vectors to compose are nearly parallel, so that without their overlap nothing is "
            "left to tell them apart: name fewer of them, or leave out 'compose'"
        )
    u, _, v = torch.linalg.svd(unit, full_matrices=False)
    found: Tensor = (u @ v * lengths).to(rows.dtype)
    return found


def compose(resolved: Sequence[Resolved]) -> list[Resolved]:
    """`resolved` with the composed form of every vector that is added or ablated.

    All additions count, whichever tokens they act on; a vector that is added twice counts once.
    Raises `SpecError` (`not_composable`), also where an overlap would stay.
    """
    meeting: dict[HookPoint, list[Resolved]] = {}
    for one in resolved:
        for point in one.points:
            meeting.setdefault(point, []).append(one)
    directions: dict[_Vector, dict[int, Tensor]] = {}
    for point, ones in meeting.items():
        _check_meeting(point, ones)
        for kind in _COMPOSED:
            mine = {
                one.direction.sha256: row(one.direction, point.layer)
                for one in ones
                if isinstance(one.item, kind)
            }
            found = orthogonalised(torch.stack(list(mine.values()))) if mine else ()
            for sha256, direction in zip(mine, found, strict=True):
                at = _Vector(kind, sha256, point.site)
                directions.setdefault(at, {})[point.layer] = direction
    return [_composed(one, directions) for one in resolved]


class _Vector(NamedTuple):
    """A vector in one of the uses that are composed apart from each other."""

    kind: type[Add | Ablate]
    sha256: str
    site: Site


def _composed(one: Resolved, directions: Mapping[_Vector, Mapping[int, Tensor]]) -> Resolved:
    if not isinstance(one.item, _COMPOSED):
        return one
    vector = one.direction
    mine = directions[_Vector(type(one.item), vector.sha256, one.points[0].site)]
    return replace(one, composed=replace(vector, directions=mine))


def _check_meeting(point: HookPoint, ones: Sequence[Resolved]) -> None:
    """Raises where interventions that meet at `point` would keep an overlap."""
    other = next((one for one in ones if not isinstance(one.item, _COMPOSED)), None)
    if len(ones) > 1 and other is not None:
        raise _not_composable(
            f"'compose' is for vectors that are added or ablated, and at {point} a "
            f"{other.item.kind!r} meets other interventions, whose overlap would stay: give it "
            "other layers, or leave out 'compose'"
        )
    ablated = [one for one in ones if isinstance(one.item, Ablate)]
    added = [one for one in ones if isinstance(one.item, Add)]
    if any(_overlap(one, two, point) for one in ablated for two in added):
        raise _not_composable(
            f"at {point} a vector is added that overlaps with one that is ablated there, and "
            "'compose' does not part these: give them different layers, or leave out 'compose'"
        )
    for one, two in combinations(ablated, 2):
        if not _same_tokens(one, two) and _overlap(one, two, point):
            raise _not_composable(
                f"what the vectors ablated at {point} span is taken away where all of them act, "
                "and they act on different tokens: give them one 'where' and one 'when', or leave "
                "out 'compose'"
            )


def _overlap(one: Resolved, two: Resolved, point: HookPoint) -> bool:
    if one.direction.sha256 == two.direction.sha256:
        return type(one.item) is not type(two.item)
    a, b = (row(each.direction, point.layer).double() for each in (one, two))
    return bool((a @ b).abs() > _ORTHOGONAL * a.norm() * b.norm())


def _same_tokens(one: Resolved, two: Resolved) -> bool:
    gates = [None if each.gate is None else each.gate.gate.identity for each in (one, two)]
    return one.selection == two.selection and gates[0] == gates[1]


def _not_composable(message: str) -> SpecError:
    return SpecError(message, code="not_composable", param="/compose")
