"""What a plan adds, as one vector, and the same plan with another vector in its place."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.edits import Block
from steer.errors import SteerError, Unsupported
from steer.laws import INTERCEPT, SLOPE, Law
from steer.plan.plan import SteeringPlan


def added_vector(plan: SteeringPlan) -> ControlVector:
    """The sum of what `plan` adds at each of its layers; where it is relative, in shares of the
    token's norm.

    Raises `Unsupported` (`no_nulls`) for a plan that does anything but add constants, to one
    selection of tokens and at one site, without a gate: chance has no form of it.
    """
    sites = {point.site for point in plan.points}
    if not plan.rules:
        raise _no_nulls("adds nothing")
    if len(plan.rules) != 1 or len(sites) != 1 or plan.gated:
        raise _no_nulls("acts on several kinds of tokens or sites, or behind a gate")
    [rule] = plan.rules
    rows = {point.layer: _constant(block) for point, block in rule.blocks.items()}
    if len({_relative(block) for block in rule.blocks.values()}) > 1:
        raise _no_nulls("adds to some layers in shares of the norm and to others not")
    try:
        return ControlVector.of(rows, site=sites.pop())
    except SteerError as error:
        raise _no_nulls(f"adds nothing that has a direction ({error})") from None


def with_vector(plan: SteeringPlan, vector: ControlVector, strength: float) -> SteeringPlan:
    """`plan`, which `added_vector` takes, adding `strength` times `vector` instead."""
    [rule] = plan.rules
    blocks = {
        point: _adding(block, vector[point.layer], strength) for point, block in rule.blocks.items()
    }
    name = f"{plan.fingerprint} with {vector.sha256} at {strength!r}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return replace(plan, fingerprint=digest, rules=(replace(rule, blocks=blocks),))


def _constant(block: Block) -> Tensor:
    if block.replace:
        raise _no_nulls("replaces states")
    if block.read is None and block.shift is not None:
        return block.shift
    if not _relative(block) or block.shift is not None:
        raise _no_nulls("does more than to add a vector")
    assert block.laws is not None
    assert block.write is not None
    return block.laws[:, INTERCEPT] @ block.write


def _relative(block: Block) -> bool:
    """Whether all that the block does is to add constants in shares of the token's norm."""
    if block.laws is None or block.read is None or block.encoder is not None:
        return False
    constant = not bool(block.laws[:, SLOPE].any()) and not bool(block.read.any())
    return constant and block.traits.relative


def _adding(block: Block, row: Tensor, strength: float) -> Block:
    if not _relative(block):
        return replace(block, shift=strength * row)
    length = float(row.double().norm())
    unit = (row / length)[None]
    law = Law.constant(strength * length, relative=True)
    edits = Block.of_edits(torch.zeros_like(unit), unit, [law])
    return replace(edits, preserve_norm=block.preserve_norm)


def _no_nulls(what: str) -> Unsupported:
    return Unsupported(
        f"there are no nulls of this spec: it {what}, and vectors of chance stand in only for "
        "vectors that are added",
        code="no_nulls",
    )
