"""What the start-up proofs of all engines share: an edit that no model can miss, and the comparison
with what the model computes without it."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.edits import Block, Law
from steer.model import HookPoint, ModelInfo
from steer.plan.plan import Rule, SteeringPlan
from steer.plan.selection import EVERYWHERE
from steer.spec import Patch, Site, SteeringSpec


def probe_shift(model: ModelInfo, site: Site, size: float = 10.0) -> Tensor:
    """What a probe adds at `site`: another number for each coordinate, up to `size`."""
    return torch.cos(torch.arange(model.width(site), dtype=torch.float32)) * size


def probe_plan(
    model: ModelInfo, point: HookPoint, *, constant: bool = True, size: float = 10.0
) -> SteeringPlan:
    """An edit that no model can miss, `probe_shift`; as a constant, or as an edit that reads the
    state."""
    direction = probe_shift(model, point.site, size)
    block = Block(shift=direction)
    if not constant:
        block = Block.of_edits(
            torch.zeros_like(direction)[None], direction[None], [Law.constant(1)]
        )
    spec = SteeringSpec(interventions=(Patch(vector="probe"),))
    name = f"probe-{point}-{constant}"
    return SteeringPlan(name, spec, (Rule(EVERYWHERE, None, {point: block}),), (), (), ())


def unchanged(row: Tensor, plain: Tensor, *, experts: bool) -> bool:
    """Bit-identical; in a mixture of experts, equal to rounding.

    There an edited neighbour may choose other experts, and the size of an expert's batch changes
    the last bits of every token in it, with or without Steer.
    """
    if torch.equal(row, plain):
        return True
    tolerance = 1e-4 if plain.dtype == torch.float32 else 5e-2
    return experts and torch.allclose(row, plain, rtol=tolerance, atol=tolerance)


_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1
"""Relative to the spread of the logits; a sequence that sees another is far outside."""


def agree(logits: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of computing the same tokens in `dtype` differ by rounding alone."""
    spread = (others - others.mean()).norm()
    tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    return bool((logits - others).norm() <= tolerance * spread)
