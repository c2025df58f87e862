"""What graphs cannot do, beside what they can: a worker in the static form against one in Python.

Both see the same steps of a random crowd: requests of every kind, clamps of a TopK SAE and captures
among them, prompts in pieces, preemption. A step that keeps its graph is a replay here: its kernels
are launched and no Python is run at its taps. States, receipts and captured states must agree.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from artefacts import EVERYTHING, artefacts, random_spec, shape_of
from pieces import drawn_pieces
from torch import Tensor

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Receipt
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.operators import set_form
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.taps import SITES, points_of
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.engines.vllm.worker.edits import Edits, StaticEdits, TapEdits
from steer.engines.vllm.worker.prepared import BatchTokens
from steer.engines.vllm.worker.requests import receipt
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

WIDTH, LAYERS, VOCABULARY, RUNNING, BATCH, REQUESTS = 24, 2, 64, 4, 24, 60
RANKED = 3
"""Tokens that may clamp features of the TopK SAE in a step that keeps its graph."""
TAPS = range(2 * LAYERS + 1)
CPU = torch.device("cpu")
MODEL = replace(shape_of(WIDTH, LAYERS), sites=SITES)
MADE = artefacts(WIDTH, LAYERS)
PLANS = PlanCache(MemoryLibrary(**MADE), MODEL, EVERYTHING)
POINTS = [point for tap in TAPS for point in points_of(tap, LAYERS)]
_generator = torch.Generator().manual_seed(12)
EMBEDDING = torch.randn(VOCABULARY, WIDTH, generator=_generator)
WEIGHTS = torch.randn(len(TAPS), WIDTH, WIDTH, generator=_generator) / WIDTH**0.5
MET = ("preempted", "captured", "competing", "mixed", "ranked in a graph", "too many")
TOPK = {"kind": "clamp", "sae": "topk", "features": [1, 5, 9], "value": 1.0}


@dataclass
class Request:
    name: str
    tokens: list[int]
    prompt_length: int
    ticket: Ticket | None
    computed: int = 0
    states: list[dict[HookPoint, Tensor]] = field(default_factory=list)


class Worker:
    """A worker's steering, and the taps of its model as the forward pass reaches them."""

    def __init__(self, edits: Edits, plans: dict[str, SteeringPlan]) -> None:
        self.steering = WorkerSteering(MODEL, plans.__getitem__, edits, max_requests=RUNNING)
        self.graphless = 0

    def step(self, batch: BatchTokens, x: Tensor) -> Tensor:
        """The last states `[T, d]` of the tokens whose embeddings are `x`."""
        off = self.steering.graphless(dict(zip(batch.req_ids, batch.counts.tolist(), strict=True)))
        self.graphless += off
        self.steering.begin(batch)
        hidden, residual = x / 3, x * 2 / 3
        for tap, weights in zip(TAPS, WEIGHTS, strict=True):
            self._tap(tap, hidden, residual, replayed=not off)
            stream = hidden + residual
            hidden, residual = torch.tanh(stream @ weights), stream
        self.steering.end()
        return hidden + residual

    def _tap(self, tap: int, hidden: Tensor, residual: Tensor, *, replayed: bool) -> None:
        if not self.steering.edits.static:
            ops.visit(tap, hidden, residual)
        elif replayed:
            assert isinstance(self.steering.edits, StaticEdits)
            self.steering.edits._form.edit(tap, hidden, residual)
        else:
            torch.ops.steer.edit_pair(hidden, residual, tap)

    def receipt(self, name: str, fed: int) -> Receipt | str:
        (record,) = self.steering.requests.records(name).values()
        try:
            return receipt(record, fed)
        except SteerError as error:
            return error.code

    def states(self, name: str) -> dict[HookPoint, Tensor]:
        (record,) = self.steering.requests.records(name).values()
        return record.request.states


def random_plan(draw: random.Random, *, competes: bool) -> SteeringPlan:
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=3)
        if competes:
            raw["interventions"].insert(0, TOPK)
        try:
            plan = PLANS.plan(parse_spec(raw))
        except SteerError:
            continue
        if plan.competes == competes:
            return plan


def random_request(draw: random.Random, number: int, plans: dict[str, SteeringPlan]) -> Request:
    length = draw.randint(1, 12)
    ranks = draw.random() < 0.2
    plan = draw.choice([None, *(one for one in plans.values() if one.competes == ranks)])
    capture = None
    if draw.random() < 0.15:
        positions = draw.sample(range(length), draw.randint(1, length))
        capture = CaptureOrder(tuple(draw.sample(POINTS, 3)), tuple(positions))
    tokens = [draw.randrange(VOCABULARY) for _ in range(length + draw.randint(1, 10))]
    name, ticket = f"r{number}", None
    if plan is not None:
        ticket = Ticket(
            name,
            fingerprint=plan.fingerprint,
            plan=plan.fingerprint,
            selections=tuple(one.selection for one in plan.rules),
            measure=draw.random() < 0.3,
            latents=plan.latents,
            graphless=plan.graphless,
            onward=plan.onward,
            capture=capture,
        )
    elif capture is not None:
        ticket = Ticket(name, capture=capture)
    return Request(name, tokens, length, ticket)


def static_edits() -> StaticEdits:
    form = StaticForm(
        MODEL,
        TAPS,
        max_requests=RUNNING,
        batch_tokens=BATCH,
        edit_rows=256,
        device=CPU,
        latents=64 * RANKED,
    )
    set_form(form)
    return StaticEdits(form, TapEdits(MODEL, RUNNING, CPU))


@pytest.mark.parametrize("seed", range(3))
def test_both_workers_do_the_same_whoever_meets_in_a_step(seed: int) -> None:
    draw = random.Random(seed)
    plans = {one.fingerprint: one for one in (random_plan(draw, competes=n < 3) for n in range(12))}
    workers = [Worker(static_edits(), plans), Worker(TapEdits(MODEL, RUNNING, CPU), plans)]
    waiting = [random_request(draw, number, plans) for number in range(REQUESTS)]
    running: list[Request] = []
    met: Counter[str] = Counter()
    while waiting or running:
        while waiting and len(running) < RUNNING and draw.random() < 0.7:
            new = waiting.pop(draw.randrange(len(waiting)))
            for worker in workers:
                worker.steering.admit(new.name, new.tokens[: new.prompt_length], new.ticket)
            running.append(new)
        if running and draw.random() < 0.15:  # it waits, and its tokens are computed again
            gone = running.pop(draw.randrange(len(running)))
            gone.computed, met["preempted"] = 0, met["preempted"] + 1
            waiting.append(gone)
        draw.shuffle(running)
        if running:
            run_step(draw, workers, running, met)
        for one in [one for one in running if one.computed == len(one.tokens)]:
            running.remove(one)
            end(workers, one, met)
    fast, reference = workers
    assert 10 < fast.graphless < met["steps"] - 10
    assert reference.graphless == 0
    assert min(met[one] for one in MET) > 1
    assert met["finished"] == REQUESTS
    assert (fast.steering.stats().slots_in_use, len(fast.steering.requests)) == (0, 0)


def run_step(
    draw: random.Random, workers: list[Worker], running: list[Request], met: Counter[str]
) -> None:
    batch, tokens, counts = drawn_pieces(draw, running)
    x = EMBEDDING[tokens]
    graphless = workers[0].graphless
    mine, other = (worker.step(batch, x.clone()) for worker in workers)
    left = workers[0].graphless > graphless
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    tickets = [one.ticket for one in running if one.ticket is not None]
    met["steps"] += 1
    met["mixed"] += left and len({one.capture is None and not one.latents for one in tickets}) == 2
    met["ranked in a graph"] += not left and any(one.latents for one in tickets)
    met["too many"] += left and all(one.capture is None for one in tickets)
    for one, count in zip(running, counts, strict=True):
        one.computed += count


def end(workers: list[Worker], one: Request, met: Counter[str]) -> None:
    """The request has ended: what it leaves is the same on both workers."""
    met["finished"] += 1
    for worker in workers:
        worker.steering.retire(one.name)
    if one.ticket is None:
        return
    if one.ticket.plan is not None:
        mine, other = (worker.receipt(one.name, one.computed) for worker in workers)
        assert rounded(mine) == rounded(other)
        met["competing"] += one.ticket.latents > 0
    if one.ticket.capture is not None:
        states, wanted = (worker.states(one.name) for worker in workers)
        assert states.keys() == wanted.keys() == set(one.ticket.capture.points)
        for point, rows in wanted.items():
            assert rows.isfinite().all()
            torch.testing.assert_close(states[point], rows, rtol=1e-4, atol=1e-4)
        met["captured"] += 1


def rounded(found: Receipt | str) -> object:
    """A receipt whose floats are rounded as the two forms round."""
    if isinstance(found, str):
        return found
    points = [replace(one, relative_size=None) for one in found.hook_points]
    gates = [replace(one, value=None) for one in found.gates]
    return replace(found, hook_points=tuple(points), gates=tuple(gates))
