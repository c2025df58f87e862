"""What passes of the kernel leave: ledgers, sizes, faults, and what carries a pass on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_forms import (
    GENERATOR,
    KINDS,
    LONGEST,
    PLANS,
    REFERENCE,
    TAPS,
    WIDTH,
    close,
    make_form,
    no_fault,
    plan_of,
)
from torch import Tensor

from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.engines.vllm.static import form as static_form
from steer.engines.vllm.taps.taps import tap_of
from steer.model import HookPoint
from steer.spec import parse_spec


class Event:
    done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_what_gates_did_is_written_down_when_it_has_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []

    def bring_back(values: Tensor) -> tuple[Tensor, Event]:
        events.append(Event())
        return values.clone(), events[-1]

    monkeypatch.setattr(static_form, "bring_back", bring_back)
    ledger = PositionLedger(2, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    gate = {"vector": "v0", "above": -1e9, "measure": "projection", "layer": 0}
    plans = [
        plan_of({**KINDS["ablate"], "when": {**gate, "scope": "token"}}),
        plan_of(KINDS["add"]),
    ]
    requests = [
        SteeredRequest(row, 2, plan, form.tables.acquire(plan)) for row, plan in enumerate(plans)
    ]

    def compute(start: int) -> None:
        spans = [
            Span(request, row, np.array([start]), np.array([3]))
            for row, request in enumerate(requests)
        ]
        running = form.begin(spans, 2, no_fault)
        assert running is not None
        states = torch.ones(2, WIDTH), torch.ones(2, WIDTH)
        for tap in TAPS:
            form.edit(tap, *states)
        running.finish()

    compute(2)
    compute(3)
    assert (ledger.applied[:, 2:4] == 0xFFFF).all()
    events[0].done = True
    form.collect()
    assert (ledger.applied[:, 2:4] == [[1, 0xFFFF], [1, 0xFFFF]]).all()
    form.collect(wait=True)
    assert (ledger.applied[:, 2:4] == 1).all()
    assert ledger.tokens[:, 1].tolist() == [2, 2]


def test_a_calm_pass_is_run_again_at_other_positions() -> None:
    """Without gates nothing is written between two passes, and each is written down."""
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    plan = plan_of(KINDS["add"])
    positions = np.array([2])
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan), measure=True)
    running = form.begin([Span(request, 0, positions, np.array([3]))], 1, no_fault)
    assert running is not None
    first = torch.randn(1, WIDTH, generator=GENERATOR)
    form.edit(tap_of(HookPoint(1)), first.clone(), None)  # a pass that failed
    running = form.begin([Span(request, 0, positions, np.array([3]))], 1, no_fault)
    assert running is not None
    for position in (2, 3, 4):
        positions[0] = position
        x = first.clone()
        for tap in TAPS:
            form.edit(tap, x, None)
        running.finish()
    assert (ledger.applied[0, 2:5] == 1).all()
    size = (x - first).norm() / first.norm()
    assert ledger.relative[HookPoint(1)].mean(0) == pytest.approx(size.item(), rel=1e-4)


def test_a_pass_is_carried_on_while_ramps_change() -> None:
    """Beside each other: one that fades, one that comes, one that has none."""
    ledger = PositionLedger(3, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    ramps = [[[0, 1], [4, 0.2]], [[1, 0.1], [3, 0.5], [6, 1]], None]
    specs = [
        parse_spec({"interventions": [KINDS[name]], "ramp": ramp})
        for name, ramp in zip(("add-norm", "swap", "ablate"), ramps, strict=True)
    ]
    places = [np.array([2 + row]) for row in range(3)]
    spans = []
    for row, spec in enumerate(specs):
        plan = PLANS.plan(spec)
        request = SteeredRequest(row, 2, plan, form.tables.acquire(plan))
        spans.append(Span(request, row, places[row], np.array([3])))
    running = form.begin(spans, 3, no_fault)
    assert running is not None
    for step in range(8):
        if step:
            for place in places:
                place[0] += 1
            running.carry_on({})
        x = torch.randn(3, WIDTH, generator=GENERATOR)
        wanted = [
            REFERENCE.steer(spec, HookPoint(1), row, int(place[0]), 2, 3)
            for spec, row, place in zip(specs, x.double().numpy(), places, strict=True)
        ]
        form.edit(tap_of(HookPoint(1)), x, None)
        close(x, torch.from_numpy(np.stack(wanted)).float(), 1e-5)
        running.finish()
    for row in range(3):
        assert (ledger.applied[row, 2 + row : 10 + row] == 1).all()


def test_a_tap_that_was_not_reached_is_a_fault() -> None:
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    gate = {"vector": "v0", "above": 0.0, "layer": 0}
    plan = plan_of({**KINDS["ablate"], "when": gate})
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    for left_out in (tap_of(HookPoint(0)), tap_of(HookPoint(1))):
        faults: list[str] = []
        running = form.begin([Span(request, 0, np.arange(2), np.arange(2))], 2, faults.append)
        assert running is not None
        for tap in set(TAPS) - {left_out}:
            form.edit(tap, torch.ones(2, WIDTH), torch.ones(2, WIDTH))
        running.finish()
        assert len(faults) == 1
        assert "never reached" in faults[0]
