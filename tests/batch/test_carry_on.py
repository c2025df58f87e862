"""A step that is carried on while its requests decode equals one built anew for every token.

It is carried on as long as nobody comes to an edge of what selects its tokens, however their
factors change meanwhile."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from artefacts import (
    EVERYTHING,
    SCOPES,
    artefacts,
    random_detection,
    random_ramp,
    random_spec,
    shape_of,
)

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import Ledger
from steer.batch.requests import Ints, Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.model import forward_order
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

WIDTH, LAYERS, VOCABULARY, REQUESTS, STEPS = 16, 4, 8, 6, 12
PLANS = PlanCache(MemoryLibrary(**artefacts(WIDTH, LAYERS)), shape_of(WIDTH, LAYERS), EVERYTHING)


def requests(draw: random.Random, tables: Tables) -> list[SteeredRequest]:
    found = []
    while len(found) < REQUESTS:
        spec = random_spec(draw, layers=LAYERS)
        if draw.random() < 0.6:
            spec["where"] = {"tokens": draw.sample(range(VOCABULARY), 3)}
        if draw.random() < 0.4:
            scope = draw.choice(SCOPES)
            direction = {"vector": "v0", "above": 0.0, "layer": 0, "scope": scope}
            spec["when"] = draw.choice([direction, random_detection(draw)])
        if draw.random() < 0.4:
            spec["ramp"] = random_ramp(draw)
        plan = PLANS.plan(parse_spec(spec))
        if 0 < len(plan.rules) <= tables.max_rules:
            row = len(found)
            found.append(SteeredRequest(row, draw.randint(1, 5), plan, tables.acquire(plan)))
    return found


def spans(requests: list[SteeredRequest], step: int, ids: Ints) -> list[Span]:
    """Each request's token, so many steps after its first."""
    found = []
    for n, request in enumerate(requests):
        position = np.array([request.prompt_length + n + step], dtype=np.int64)
        found.append(Span(request, n, position, ids[n : n + 1]))
    return found


def until(request: SteeredRequest, position: int) -> int:
    """Where a request's token at `position` has to be looked at anew."""
    return min(one.selection.fixed_until(position, request.prompt_length) for one in request.rules)


@pytest.mark.parametrize("seed", range(40))
def test_equals_a_step_built_anew(seed: int) -> None:
    draw = random.Random(seed)
    tables = Tables(shape_of(WIDTH, LAYERS), slots=REQUESTS)
    mine = requests(draw, tables)
    generator = torch.Generator().manual_seed(seed)
    ledgers = Ledger(REQUESTS), Ledger(REQUESTS)
    decided = torch.rand(ledgers[0].gate_open.shape, generator=generator) > 0.5
    for ledger in ledgers:
        ledger.gate_open[:] = decided  # by prompts that were computed before
    reads_tokens = {
        n
        for n, request in enumerate(mine)
        if request.plan and any(one.selection.reads_tokens for one in request.plan.rules)
    }
    carried, before, edges, built = None, None, [0] * REQUESTS, 0
    for number in range(STEPS):
        ids = np.array([draw.randrange(VOCABULARY) for _ in mine], dtype=np.int64)
        now = spans(mine, number, ids)
        slots = [span.request.slots(span.positions, span.tokens)[:, 0] for span in now]
        anew = build_step(tables, ledgers[0], now, REQUESTS)
        places = [int(span.positions[0]) for span in now]
        if before is None or any(place >= edge for place, edge in zip(places, edges, strict=True)):
            carried = build_step(tables, ledgers[1], now, REQUESTS, reads_tokens=reads_tokens)
            edges = [until(one, place) for one, place in zip(mine, places, strict=True)]
            built += 1
        else:
            assert carried is not None
            changed = {n: s for n, s in enumerate(slots) if not np.array_equal(s, before[n])}
            assert changed.keys() <= reads_tokens
            carried.carry_on(changed)
        before = slots
        assert anew is not None
        assert carried is not None
        assert anew.points <= carried.points
        for point in sorted(carried.points, key=forward_order):
            x = torch.randn(REQUESTS, WIDTH, generator=generator)
            torch.testing.assert_close(
                carried.edit(point, x.clone()), anew.edit(point, x.clone()), rtol=1e-5, atol=1e-5
            )
        anew.finish()
        carried.finish()
    assert built < STEPS
    assert np.array_equal(ledgers[0].tokens, ledgers[1].tokens)
    assert np.array_equal(ledgers[0].shares, ledgers[1].shares)
    assert torch.equal(ledgers[0].onset, ledgers[1].onset)
    assert ledgers[0].tokens[:, 1:].sum() > 0
