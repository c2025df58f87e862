"""Receipts from what an engine counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from steer.batch.ledger import Ledger
from steer.batch.requests import Ints, SteeredRequest
from steer.engines.base import (
    GateReceipt,
    PointReceipt,
    RampReceipt,
    Receipt,
    SpeculationReceipt,
)
from steer.plan.plan import Gate, SteeringPlan

_DIGITS = 6
"""Of the mean of factors, which are float32."""


def make_receipt(steered: SteeredRequest, ledger: Ledger, fed: int) -> Receipt:
    """The receipt of a request whose sequence fed `fed` tokens, from what the steps counted."""
    if steered.plan is None:
        raise AssertionError("an unsteered request has no receipt")
    counts, shares = ledger.tokens[steered.row], ledger.shares[steered.row]
    return receipt_of(steered, steered.plan, ledger, counts, fed, shares=shares)


def shares_of(request: SteeredRequest, positions: Ints, applied: Ints) -> NDArray[np.float64]:
    """The sum of the factors `[P]` of the tokens at `positions`, which the rules `applied` edited;
    without ramps that of each is 1."""
    selected = applied >> np.arange(len(request.rules))[:, None] & 1
    factors = request.factors(positions)
    found: NDArray[np.float64] = (selected if factors is None else selected * factors).sum(1)
    return found.astype(np.float64)


def receipt_of(
    request: SteeredRequest,
    plan: SteeringPlan,
    ledger: Ledger,
    counts: NDArray[np.int64],
    fed: int,
    *,
    shares: NDArray[np.float64],
    cached: int = 0,
) -> Receipt:
    """`counts[applied]` is the number of tokens that the rules named by `applied` edited, and
    `shares[rule]` the sum of their factors; `cached` of the steered ones were not computed for this
    request. Sizes are means over what the ledger saw computed, however often that was, but for
    drafted tokens that did not stay."""
    applied = np.arange(len(counts))

    def edited_by(rules: int) -> int:
        """The tokens that any of the rules named by these bits edited."""
        return int(counts[(applied & rules) != 0].sum())

    steered = int(counts[1:].sum())
    points = []
    for point in plan.points:
        touching = sum(1 << n for n, one in enumerate(plan.rules) if point in one.blocks)
        tokens = edited_by(touching)
        size = None
        if request.measure and point in ledger.relative:
            size = ledger.relative[point].mean(request.row)
        points.append(PointReceipt(point, tokens, size))
    gates = [
        _gate(request, one.gate, number, ledger, fed, edited_by(1 << number))
        for number, one in enumerate(plan.rules)
        if one.gate is not None
    ]
    ramps = []
    for number, one in enumerate(plan.rules):
        if one.selection.ramp is not None:
            tokens = edited_by(1 << number)
            mean = _mean(float(shares[number]), tokens)
            ramps.append(RampReceipt(one.selection.ramp.points, tokens, mean))
    return Receipt(
        plan.fingerprint,
        steered,
        fed - steered,
        cached,
        tuple(points),
        tuple(gates),
        plan.resolved_strengths,
        plan.explanations,
        ramps=tuple(ramps),
    )


def _gate(
    request: SteeredRequest, gate: Gate, number: int, ledger: Ledger, fed: int, fired: int
) -> GateReceipt:
    value = float(ledger.gate_value[request.row, number])
    opened_at = None
    if gate.onward:
        # A token that was drafted, or computed once too often, may have opened it and not stayed.
        onset = int(ledger.onset[request.row, number])
        opened_at = onset if onset < fed else None
        value = value if onset < fed else math.nan
    elif gate.prompt_scope and bool(ledger.gate_open[request.row, number]):
        opened_at = request.prompt_length - 1
    return GateReceipt(gate.name, fired, value if math.isfinite(value) else None, opened_at)


def merged(receipts: Iterable[Receipt | None]) -> Receipt | None:
    """Token counts add up; sizes are means over tokens. None where nothing was steered."""
    found = [receipt for receipt in receipts if receipt is not None]
    if len(found) < 2:
        return found[0] if found else None
    return replace(
        found[0],
        tokens_steered=sum(one.tokens_steered for one in found),
        tokens_skipped=sum(one.tokens_skipped for one in found),
        tokens_cached=sum(one.tokens_cached for one in found),
        hook_points=_points(found),
        gates=_gates(found),
        speculation=_speculation(found),
        ramps=_ramps(found),
    )


def _points(receipts: Sequence[Receipt]) -> tuple[PointReceipt, ...]:
    rows: dict[object, list[PointReceipt]] = {}
    for receipt in receipts:
        for entry in receipt.hook_points:
            rows.setdefault(entry.point, []).append(entry)
    return tuple(_point(entries) for entries in rows.values())


def _point(entries: Sequence[PointReceipt]) -> PointReceipt:
    tokens = sum(entry.tokens for entry in entries)
    measured = [e for e in entries if e.relative_size is not None and e.tokens]
    weight = sum(entry.tokens for entry in measured)
    size = sum((e.relative_size or 0.0) * e.tokens for e in measured) / weight if weight else None
    return PointReceipt(entries[0].point, tokens, size)


def _speculation(receipts: Sequence[Receipt]) -> SpeculationReceipt | None:
    found = [one.speculation for one in receipts if one.speculation is not None]
    if not found:
        return None
    return SpeculationReceipt(sum(s.drafted for s in found), sum(s.accepted for s in found))


def _ramps(receipts: Sequence[Receipt]) -> tuple[RampReceipt, ...]:
    """Ramps by their place."""
    places = zip(*(receipt.ramps for receipt in receipts), strict=True)
    return tuple(_ramp(ramps) for ramps in places)


def _ramp(ramps: Sequence[RampReceipt]) -> RampReceipt:
    tokens = sum(one.tokens for one in ramps)
    total = sum((one.mean or 0.0) * one.tokens for one in ramps)
    return RampReceipt(ramps[0].points, tokens, _mean(total, tokens))


def _mean(total: float, tokens: int) -> float | None:
    """Rounded, so that it is the same in whatever order it was summed."""
    return round(total / tokens, _DIGITS) if tokens else None


def _gates(receipts: Sequence[Receipt]) -> tuple[GateReceipt, ...]:
    """Gates by their place; value and position are those of the sequence in which it opened first,
    or the first sequence's: what the prompt decided they share."""
    return tuple(
        replace(min(gates, key=_opened_at), fired=sum(gate.fired for gate in gates))
        for gates in zip(*(receipt.gates for receipt in receipts), strict=True)
    )


def _opened_at(gate: GateReceipt) -> float:
    return math.inf if gate.position is None else gate.position
