"""Receipts of several sequences as one."""

from __future__ import annotations

from dataclasses import replace

from steer.engines.base import (
    GateReceipt,
    PointReceipt,
    RampReceipt,
    Receipt,
    SpeculationReceipt,
)
from steer.engines.receipts import merged
from steer.model import HookPoint

FIRST = Receipt("f", 10, 2, 3, (PointReceipt(HookPoint(2), 10, 0.1),), (GateReceipt("g", 4, 0.7),))
SECOND = Receipt("f", 30, 1, 0, (PointReceipt(HookPoint(2), 30, 0.2),), (GateReceipt("g", 5, 0.7),))


def test_counts_add_up_and_sizes_are_weighted() -> None:
    both = merged([FIRST, SECOND])
    assert both is not None
    assert (both.tokens_steered, both.tokens_skipped, both.tokens_cached) == (40, 3, 3)
    (point,) = both.hook_points
    assert point.tokens == 40
    assert point.relative_size is not None
    assert abs(point.relative_size - 0.175) < 1e-12
    assert both.gates == (GateReceipt("g", 9, 0.7),)


def test_one_receipt_stays_and_none_is_none() -> None:
    assert merged([None, FIRST]) is FIRST
    assert merged([None, None]) is None


def test_what_was_drafted_adds_up_and_is_told_where_an_engine_speculates() -> None:
    first = replace(FIRST, speculation=SpeculationReceipt(drafted=9, accepted=4))
    second = replace(SECOND, speculation=SpeculationReceipt(drafted=3, accepted=0))
    both = merged([first, second])
    assert both is not None
    assert both.as_json()["speculation"] == {"drafted": 12, "accepted": 4}
    plain = merged([FIRST, SECOND])
    assert plain is not None
    assert "speculation" not in plain.as_json()


def test_factors_of_ramps_are_weighted_by_tokens() -> None:
    points = ((0, 1.0), (8, 0.0))
    first = replace(FIRST, ramps=(RampReceipt(points, 10, 0.5), RampReceipt(points, 0)))
    second = replace(SECOND, ramps=(RampReceipt(points, 30, 0.7), RampReceipt(points, 0)))
    both = merged([first, second])
    assert both is not None
    assert both.as_json()["ramps"] == [
        {"points": [[0, 1.0], [8, 0.0]], "tokens": 40, "mean": 0.65},
        {"points": [[0, 1.0], [8, 0.0]], "tokens": 0, "mean": None},
    ]
