"""One receipt for a request of several sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from steer.engines.base import GateReceipt, PointReceipt, Receipt


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


def _gates(receipts: Sequence[Receipt]) -> tuple[GateReceipt, ...]:
    """Gates by their place; the value is the first sequence's, as they share the prompt."""
    return tuple(
        replace(gates[0], fired=sum(gate.fired for gate in gates))
        for gates in zip(*(receipt.gates for receipt in receipts), strict=True)
    )
