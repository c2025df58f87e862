"""Ramps: a share of an edit by the number of the generated token, whatever pass computes it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, artefacts, random_intervention, random_ramp, shape_of
from float64_reference import Float64Reference

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import Ledger
from steer.batch.ramps import Ramps
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.receipts import make_receipt
from steer.model import HookPoint, forward_order
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

WIDTH, LAYERS, PROMPT, LENGTH = 16, 4, 4, 14
MADE = artefacts(WIDTH, LAYERS)
REFERENCE = Float64Reference(**MADE)
PLANS = PlanCache(MemoryLibrary(**MADE), shape_of(WIDTH, LAYERS), EVERYTHING)
IDS = np.arange(LENGTH)
KINDS = [random_intervention(random.Random(seed), LAYERS) for seed in range(40)]
ADD = {"kind": "add", "vector": "v1", "layers": [1, 2], "strength": 3.0}


def states(point: HookPoint) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, str(point))))
    return torch.randn(LENGTH, WIDTH, generator=generator)


def plan_of(item: dict[str, Any], **spec: Any) -> SteeringPlan:
    return PLANS.plan(parse_spec({"interventions": [item], **spec}))


class Run:
    """One request beside others, computed in pieces; what became of its states at every point."""

    def __init__(self, plan: SteeringPlan, *others: SteeringPlan, pieces: int = LENGTH) -> None:
        tables, self.ledger = Tables(shape_of(WIDTH, LAYERS), slots=4), Ledger(4)
        everybody = [
            SteeredRequest(row, PROMPT, one, tables.acquire(one))
            for row, one in enumerate([plan, *others])
        ]
        self.mine = everybody[0]
        self.results: dict[HookPoint, torch.Tensor] = {p: states(p).clone() for p in plan.points}
        for start in range(0, LENGTH, pieces):
            places = np.arange(start, min(start + pieces, LENGTH))
            count = len(places)
            spans = [Span(one, n * count, places, IDS[places]) for n, one in enumerate(everybody)]
            step = build_step(tables, self.ledger, spans, count * len(everybody))
            if step is None:
                continue
            for point in sorted(step.points, key=forward_order):
                x = states(point)[places].repeat(len(everybody), 1)
                edited = step.edit(point, x)
                if point in self.results:
                    self.results[point][places] = edited[:count]
            step.finish()

    def same(self, other: Run) -> bool:
        return self.results.keys() == other.results.keys() and all(
            torch.equal(mine, other.results[point]) for point, mine in self.results.items()
        )


@pytest.mark.parametrize("norm", [None, "preserve"])
@pytest.mark.parametrize("item", KINDS)
def test_every_kind_goes_a_share_of_its_way(item: dict[str, Any], norm: str | None) -> None:
    spec = parse_spec(
        {"interventions": [item], "norm": norm, "ramp": [[1, 0.5], [4, 1], [8, 0.125]]}
    )
    for pieces in (LENGTH, 1):
        run = Run(PLANS.plan(spec), plan_of(ADD), pieces=pieces)
        for point, found in run.results.items():
            rows = states(point).double().numpy()
            wanted = np.stack(
                [
                    REFERENCE.steer(spec, point, row, n, PROMPT, int(IDS[n]))
                    for n, row in enumerate(rows)
                ]
            )
            worst = np.abs(found.double().numpy() - wanted).max()
            assert worst <= 2e-5 * (1 + np.abs(wanted).max())


@pytest.mark.parametrize("item", KINDS)
def test_a_ramp_of_one_is_no_ramp_to_the_bit(item: dict[str, Any]) -> None:
    plain, ramped = plan_of(item), plan_of({**item, "ramp": [[0, 1], [5, 1]]})
    assert ramped.fingerprint == plain.fingerprint
    assert not ramped.ramped
    assert Run(plain).same(Run(ramped))


@pytest.mark.parametrize("item", KINDS)
def test_a_neighbour_with_a_ramp_changes_nothing_to_the_bit(item: dict[str, Any]) -> None:
    """Nor does a factor of 1 in the middle of a ramp."""
    other = plan_of({**ADD, "ramp": [[0, 0.3], [5, 0.7]]})
    plain = plan_of(item)
    beside = Run(plain, other)
    assert beside.same(Run(plain, plan_of({**ADD, "strength": 2.0})))
    whole = Run(plan_of({**item, "ramp": [[7, 1], [8, 0]]}), other)
    for point, found in beside.results.items():
        assert torch.equal(found[: PROMPT + 8], whole.results[point][: PROMPT + 8])


@pytest.mark.parametrize("item", KINDS)
def test_a_token_at_0_keeps_its_bits_and_counts_as_skipped(item: dict[str, Any]) -> None:
    plan = plan_of({**item, "ramp": [[3, 0], [4, 1], [5, 0]], "where": {"positions": [[0, None]]}})
    run = Run(plan, plan_of(ADD))
    for point, found in run.results.items():
        same = (found == states(point)).all(dim=1)
        assert same[np.arange(LENGTH) != PROMPT + 4].all()
    receipt = make_receipt(run.mine, run.ledger, LENGTH)
    assert receipt.tokens_steered == (1 if plan.rules else 0)
    assert receipt.tokens_skipped == LENGTH - receipt.tokens_steered


def test_a_ramp_that_stays_at_s_is_the_strength_s() -> None:
    for kind in (ADD, {"kind": "ablate", "vector": "v2", "layers": [0], "strength": 1.0}):
        for norm in (None, "preserve"):
            ramped = Run(plan_of({**kind, "ramp": [[0, 0.4]]}, norm=norm))
            plain = Run(plan_of({**kind, "strength": 0.4 * kind["strength"]}, norm=norm))
            for point, found in ramped.results.items():
                torch.testing.assert_close(found, plain.results[point], rtol=1e-5, atol=1e-5)


def test_a_ramp_at_0_does_nothing_at_all() -> None:
    plan = plan_of({**ADD, "ramp": [[0, 0]]})
    assert plan.rules == ()


def test_an_intervention_has_its_own_ramp_or_the_spec_s() -> None:
    other = {"kind": "ablate", "vector": "v2", "layers": [0]}
    both = PLANS.plan(
        parse_spec({"interventions": [ADD, {**other, "ramp": [[0, 1]]}], "ramp": [[0, 1], [8, 0]]})
    )
    alone = PLANS.plan(parse_spec({"interventions": [{**ADD, "ramp": [[0, 1], [8, 0]]}, other]}))
    assert both.fingerprint == alone.fingerprint
    assert [one.selection.ramp is not None for one in both.rules] == [True, False]


def test_receipts_say_the_ramp_and_the_mean_of_its_factors() -> None:
    plan = plan_of({**ADD, "ramp": [[0, 1], [8, 0]]})
    for pieces in (LENGTH, 3, 1):
        run = Run(plan, pieces=pieces)
        receipt = make_receipt(run.mine, run.ledger, LENGTH).as_json()
        # The prompt has the first factor, and the last two tokens none.
        factors = [1.0] * PROMPT + [1 - n / 8 for n in range(8)]
        assert receipt["ramps"] == [
            {"points": [[0, 1.0], [8, 0.0]], "tokens": 12, "mean": round(np.mean(factors), 6)}
        ]
    plain = Run(plan_of(ADD))
    assert "ramps" not in make_receipt(plain.mine, plain.ledger, LENGTH).as_json()


def test_what_is_computed_again_counts_once() -> None:
    plan = plan_of({**ADD, "ramp": [[0, 1], [8, 0]]})
    run = Run(plan)
    before = run.ledger.shares[0].copy()
    assert before[0] > 0
    run.ledger.recount(0)
    assert run.ledger.shares[0].sum() == 0


@pytest.mark.parametrize("seed", range(20))
def test_factors_are_moved_as_they_are_looked_up(seed: int) -> None:
    """Of many requests at once, to the bit, through every point of their ramps."""
    draw = random.Random(seed)
    requests: list[SteeredRequest] = []
    while len(requests) < 12:
        items = [
            {**ADD, "layers": [layer], "ramp": random_ramp(draw)} if draw.random() < 0.7
            else {**ADD, "layers": [layer]}
            for layer in range(draw.randint(1, 3))
        ]  # fmt: skip
        plan = PLANS.plan(parse_spec({"interventions": items}))
        if draw.random() < 0.3:
            plan = replace(
                plan,
                rules=tuple(
                    replace(one, selection=one.selection.anchored(PROMPT)) for one in plan.rules
                ),
            )
        requests.append(SteeredRequest(len(requests), draw.randint(1, 9), plan, 1))
    starts = [one.prompt_length + draw.randint(0, 6) for one in requests]

    def spans(step: int) -> list[Span]:
        places = (np.array([start + step]) for start in starts)
        each = zip(requests, places, strict=True)
        return [Span(one, n, at, at) for n, (one, at) in enumerate(each)]

    shape = (max(len(one.rules) for one in requests), len(requests))
    carried = Ramps.of(spans(0), shape)
    assert carried is not None
    moved = 0
    for step in range(1, 40):
        before = carried.factors.copy()
        changed = carried.carry_on()
        moved += changed
        anew = Ramps.of(spans(step), shape)
        assert anew is not None
        assert np.array_equal(carried.factors, anew.factors)
        assert changed or np.array_equal(carried.factors, before)
    assert 1 <= moved < 39, "ramps move, and then are over"


def test_a_text_read_as_one_prompt_has_the_factors_of_its_generation() -> None:
    plan = plan_of({**ADD, "ramp": [[0, 1], [8, 0]]})
    [selection] = plan.selections
    fixed, places = selection.anchored(PROMPT), np.arange(LENGTH)
    assert selection.ramp is not None
    assert fixed.ramp is not None
    for length in (PROMPT, LENGTH):
        assert np.array_equal(
            fixed.ramp.factors(places, length), selection.ramp.factors(places, PROMPT)
        )
        assert np.array_equal(fixed.mask(places, length, IDS), selection.mask(places, PROMPT, IDS))
        assert fixed.fixed_from(length) >= PROMPT + 8
