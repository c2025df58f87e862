"""Gates that pool take together the scores of the last tokens they read, however these come."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, SCOPES, artefacts, shape_of
from float64_reference import OnwardGates, ReadScores
from hypothesis import given, settings
from hypothesis import strategies as st
from lives import Life, Tabled, Told, lead

from steer.artefacts.detection import Detection, Pooling
from steer.artefacts.detector import Detector, ScoreWindow
from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import PositionLedger
from steer.batch.pooling import pool
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.engines.receipts import make_receipt
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import GateScope, parse_spec

WIDTH, LAYERS, LONGEST = 16, 4, 24
DIRECTION = torch.zeros(WIDTH)
DIRECTION[3] = 1.0
THRESHOLD = 0.51
"""No mean of so few whole numbers, nor the greatest of them."""
tokens = st.builds(Told, st.integers(0, 2), st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]))


def plan_of(
    scope: GateScope, pooling: Pooling, last: int, selected: frozenset[int]
) -> SteeringPlan:
    """Two interventions behind one gate, which select tokens of different ids; the second pools
    others than the first."""
    detector = Detector.of(
        DIRECTION, layer=0, threshold=THRESHOLD, detection=Detection(pooling=pooling, last=last)
    )
    library = MemoryLibrary(artefacts(WIDTH, LAYERS)["vectors"], detectors={"d": detector})
    spec: dict[str, Any] = {
        "interventions": [
            {"kind": "add", "vector": "v0", "layers": [2], "strength": 1.0},
            {"kind": "ablate", "vector": "v1", "layers": [3], "where": {"tokens": [1]}},
        ],
        "when": {"detector": "d", "scope": scope},
        "where": {"tokens": sorted(selected)},
    }
    return PlanCache(library, shape_of(WIDTH, LAYERS), EVERYTHING).plan(parse_spec(spec))


def run(step: Step, shown: list[Told]) -> None:
    x = torch.randn(len(shown), WIDTH)
    x[:, 3] = torch.tensor([told.value for told in shown])
    for layer in range(LAYERS):
        step.edit(HookPoint(layer), x.clone())
    step.finish()


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.lists(tokens, min_size=2, max_size=LONGEST), min_size=1, max_size=3),
    st.frozensets(st.integers(0, 2), min_size=1),
    st.sampled_from(SCOPES),
    st.sampled_from(["max", "mean"]),
    st.integers(1, 5),
    st.data(),
)
def test_a_gate_pools_what_it_read_last_however_tokens_are_computed(
    sequences: list[list[Told]],
    selected: frozenset[int],
    scope: GateScope,
    pooling: Pooling,
    last: int,
    data: st.DataObject,
) -> None:
    """In chunks, in one batch, again from any position, behind drafts that do not stay."""
    plan = plan_of(scope, pooling, last, selected)
    tables = Tables(shape_of(WIDTH, LAYERS), slots=2)
    ledger = PositionLedger(4, 3 * LONGEST, torch.device("cpu"), drafts=LONGEST)
    where = Tabled(plan, tables, tables.acquire(plan), ledger)
    found_again = scope != "onward"  # whose onset is that of the tokens of the last pass
    for one in lead(data, sequences, tokens, where, run, found_again=found_again):
        for place, ids in enumerate((selected, frozenset({1}))):
            _check(where, one, place, ids, truth(plan, one, place, ids))
    for row in range(4):
        ledger.reset(row)
    assert not ledger.scores._lines


class Truth:
    """What one gate did: where it let its intervention act, what it read at each token, and where
    it opened."""

    def __init__(self) -> None:
        self.acted: list[bool] = []
        self.values: dict[int, float] = {}
        self.opened: int | None = None


def truth(plan: SteeringPlan, one: Life, place: int, ids: frozenset[int]) -> Truth:
    gate = plan.rules[0].gate
    assert gate is not None
    found, read, onward = Truth(), ReadScores(), OnwardGates()
    for position, told in enumerate(one.tokens):
        mine = told.token in ids
        if position < one.prompt_length if gate.prompt_scope else mine:
            read.tell(place, told.value)
            found.values[position] = read.pooled(place, gate.pooling, gate.last)
        is_open = found.values.get(position, -math.inf) > THRESHOLD
        if gate.onward:
            onward.tell(place, position, selected=mine, in_range=is_open)
            is_open = onward.are_open(place, position)
            found.opened = onward.onsets.get(place)
        elif gate.prompt_scope:
            deciding = one.prompt_length - 1
            is_open = position >= deciding and found.values[deciding] > THRESHOLD
            found.opened = deciding if is_open else None
        found.acted.append(mine and is_open)
    return found


def _check(where: Tabled, one: Life, place: int, ids: frozenset[int], wanted: Truth) -> None:
    point = (HookPoint(2), HookPoint(3))[place]
    (number,) = (n for n, rule in enumerate(where.plan.rules) if point in rule.blocks)
    applied = where.ledger.applied[one.row, : len(one.tokens)] >> number & 1
    assert applied.astype(bool).tolist() == wanted.acted
    request = SteeredRequest(one.row, one.prompt_length, where.plan)
    gate = make_receipt(request, where.ledger, len(one.tokens)).gates[number]
    assert gate.position == wanted.opened
    rule = where.plan.rules[number].gate
    assert rule is not None
    read_at = one.prompt_length - 1 if rule.prompt_scope else wanted.opened
    if rule.scope == "token" or read_at is None:
        assert gate.value is None
    else:
        assert gate.value == pytest.approx(wanted.values[read_at], abs=1e-6)


scores = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from(
    [math.inf, -math.inf, math.nan]
)


@given(st.lists(scores, min_size=1, max_size=20), st.integers(1, 6))
def test_what_is_pooled_is_what_an_armed_detector_pools(scores: list[float], last: int) -> None:
    windows = {mean: ScoreWindow("mean" if mean else "max", last) for mean in (False, True)}
    for end, score in enumerate(scores, start=1):
        window = scores[max(end - last, 0) : end]
        row = torch.tensor([window + [7.0] * (last - len(window))] * 2)
        there = torch.arange(last).expand(2, -1) < len(window)
        greatest, mean = pool(row, there, torch.tensor([False, True])).tolist()
        for found, wanted in (
            (greatest, windows[False].push(score)),
            (mean, windows[True].push(score)),
        ):
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-37, nan_ok=True)


def test_a_row_that_is_given_to_another_request_knows_nothing_of_the_last() -> None:
    plan = plan_of("token", "max", 5, frozenset({0}))
    tables = Tables(shape_of(WIDTH, LAYERS), slots=2)
    slot, ledger = tables.acquire(plan), PositionLedger(4, LONGEST, torch.device("cpu"))
    positions, ids = np.arange(2), np.zeros(2, dtype=np.int64)
    acted = []
    for value in (3.0, -1.0):
        span = Span(SteeredRequest(3, 1, plan, slot), 0, positions, ids)
        step = build_step(tables, ledger, [span], 2)
        assert step is not None
        ledger.expect(np.full(2, 3), positions)
        run(step, [Told(0, value), Told(0, -1.0)])
        acted.append((ledger.applied[3, :2] & 1).tolist())
        ledger.reset(3)
    assert acted == [[1, 1], [0, 0]]
