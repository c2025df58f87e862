"""The kernel agrees with the torch form on every pass of random lives of requests."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, SCOPES
from kernel_forms import (
    GENERATOR,
    KINDS,
    LONGEST,
    REFERENCE,
    REQUESTS,
    SLOTS,
    TAPS,
    WIDTH,
    Simulation,
    make_form,
    no_fault,
    onward_plan,
    plan_of,
    random_plan,
    random_requests,
    ranking_plan,
    reading_plan,
)

from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest


@pytest.mark.parametrize(
    ("dtype", "seed"),
    [(torch.float32, seed) for seed in range(8)]
    + [(dtype, seed) for dtype in (torch.float16, torch.bfloat16) for seed in range(3)],
    ids=str,
)
def test_both_forms_agree_on_every_pass(dtype: torch.dtype, seed: int) -> None:
    simulation = Simulation(seed, dtype)
    simulation.run(random_requests(random.Random(300 + seed), REQUESTS))
    assert simulation.untouched > 20
    assert simulation.edited > 20


@pytest.mark.parametrize("seed", range(3))
def test_an_onward_gate_is_open_from_its_first_token_in_both_forms(seed: int) -> None:
    """Also for requests that are taken up again from before that token."""
    simulation = Simulation(seed, torch.float32)
    simulation.run(random_requests(random.Random(700 + seed), REQUESTS // 3, onward_plan))
    assert simulation.opened > 10
    assert simulation.edited > 10
    assert simulation.carried > 5


@pytest.mark.parametrize("seed", range(2))
def test_a_pass_is_carried_on_while_tokens_trigger_and_gates_decide(seed: int) -> None:
    simulation = Simulation(seed, torch.float32)
    watching = partial(random_plan, triggered=True)
    simulation.run(random_requests(random.Random(800 + seed), REQUESTS, watching))
    assert simulation.carried > 4
    assert simulation.changed > 2


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_of_one_half_is_edited_whole(seed: int) -> None:
    simulation = Simulation(seed, torch.float32, split=False)
    simulation.run(random_requests(random.Random(400 + seed), REQUESTS))
    assert simulation.edited > 20


@pytest.mark.parametrize("programs", [1, 40])
def test_features_are_clamped_by_their_rank_among_other_edits_and_gates(programs: int) -> None:
    """By one program for a token, or several; in prompts and in what is generated."""
    simulation = Simulation(7, torch.float32, programs=programs)
    simulation.run(random_requests(random.Random(500), REQUESTS // 3, ranking_plan))
    assert simulation.edited > 10
    assert not simulation.form.buffers.arrived.any()


@pytest.mark.parametrize(("seed", "programs"), [(0, 1), (1, 40), (2, 40)])
def test_what_is_read_at_one_point_is_written_at_another(seed: int, programs: int) -> None:
    simulation = Simulation(seed, torch.float32, programs=programs)
    requests = random_requests(random.Random(600 + seed), REQUESTS // 3, reading_plan)
    simulation.run(requests)
    assert simulation.edited > 10
    assert not simulation.form.buffers.arrived.any()


def test_the_simulation_meets_what_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens behind a decision in the same pass, drafts that do not stay, requests taken up again,
    passes that are carried on while tokens get other slots, gates, every kind."""
    monkeypatch.setattr(Simulation, "_compute", lambda *_: None)
    windows = resumed = detecting = rejected = carried = changed = 0
    scopes: Counter[str] = Counter()
    plans: set[str] = set()
    kinds: set[str] = set()
    for seed in range(8):
        requests = random_requests(random.Random(300 + seed), REQUESTS)
        simulation = Simulation(seed, torch.float32)
        simulation.run(requests)
        steered = [r.plan for r in requests if r.plan is not None]
        gates = [one.gate for plan in steered for one in plan.rules if one.gate is not None]
        windows += simulation.windows
        resumed += simulation.resumed
        rejected += simulation.rejected
        carried += simulation.carried
        changed += simulation.changed
        scopes.update(gate.scope for gate in gates)
        detecting += sum(gate.bias != 0 for gate in gates)
        plans |= {plan.fingerprint for plan in steered}
        kinds |= {item.kind for plan in steered for item in plan.spec.interventions}
    assert windows > 10
    assert resumed > 5
    assert rejected > 20
    assert carried > 60
    assert changed > 10
    assert all(scopes[scope] > 10 for scope in SCOPES)
    assert detecting > 10
    assert len(plans) > 4 * SLOTS
    assert kinds == set(EVERYTHING.kinds) - {"concept"}


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_tokens_behind_the_last_of_the_prompt_take_its_decision(opens: bool, split: bool) -> None:
    """In the pass that decides, in the next, and when it is forgotten only where it is unknown."""
    bound = {"above" if opens else "below": -1e9, "measure": "projection", "layer": 1}
    plan = plan_of({**KINDS["patch"], "when": {"vector": "resid_mid-0", **bound}})
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    request = SteeredRequest(0, 3, plan, form.tables.acquire(plan))
    row = REFERENCE.row("v3", 1)

    def edited(start: int, stop: int) -> list[bool]:
        positions = np.arange(start, stop)
        running = form.begin([Span(request, 1, positions, positions)], stop - start + 1, no_fault)
        assert running is not None
        half = torch.randn(stop - start + 2, WIDTH, generator=GENERATOR)
        other = torch.randn(half.shape, generator=GENERATOR) if split else None
        for tap in TAPS:
            form.edit(tap, half, other)
        running.finish()
        stream = half if other is None else half + other
        found = np.abs(stream.double().numpy() - row).max(1) < 1e-5
        assert not found[0]
        assert not found[-1]
        return [bool(one) for one in found[1:-1]]

    assert edited(0, 2) == [False, False]
    assert edited(2, 6) == [opens] * 4
    assert edited(6, 7) == [opens]
    assert edited(4, 5) == [opens]
    assert ledger.applied[0, :7].tolist() == [0, 0, *[opens] * 5]
    ledger.reset(0)
    assert edited(5, 6) == [False]
    assert edited(0, 6) == [False, False, *[opens] * 4]
    assert ledger.gate_open[0, 0].item() is opens
