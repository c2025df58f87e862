"""Random lives of many requests over one set of tables, against float64, token by token.

The model is four layers of residual arithmetic without attention, so that a token's result depends
on its own steering alone: any leak from a neighbour, a stale slot or a wrong position shows.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import (
    EVERYTHING,
    SAE_NAMES,
    SCOPES,
    artefacts,
    random_detection,
    random_roles,
    random_spans,
    random_spec,
    shape_of,
    span_vocabulary,
)
from float64_reference import (
    Array,
    Float64Reference,
    OnwardGates,
    ReadScores,
    Seen,
    chosen,
    selected,
)

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import SHUT, Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.errors import SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.plan.selection import trace_of
from steer.prompts.roles import RoleRanges
from steer.spec import SteeringSpec, When, WhenDetected, WhenDirection, Where, parse_spec

WIDTH, LAYERS, VOCABULARY = 16, 4, 64
SLOTS, ROWS = 3, 8
POINTS = [HookPoint(layer, site) for layer in range(LAYERS) for site in ("mlp_out", "resid_post")]
_generator = torch.Generator().manual_seed(12)
EMBEDDING = torch.randn(VOCABULARY, WIDTH, generator=_generator)
WEIGHTS = torch.randn(LAYERS, WIDTH, WIDTH, generator=_generator) / WIDTH**0.5
MADE = artefacts(WIDTH, LAYERS)
REFERENCE = Float64Reference(**MADE)
PIECES = span_vocabulary(VOCABULARY)
PLANS = PlanCache(
    MemoryLibrary(**MADE), shape_of(WIDTH, LAYERS), EVERYTHING, vocabulary=lambda: PIECES
)


@dataclass
class Request:
    prompt_length: int
    tokens: list[int]
    spec: SteeringSpec | None
    plan: SteeringPlan | None
    computed: int = 0
    request: SteeredRequest | None = None
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    roles: RoleRanges | None = None

    @property
    def seen(self) -> Seen:
        return Seen.of(self.tokens, PIECES, self.roles)


class Truth:
    """What each token of one request must become, in float64, and how often it was edited."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.touched: Counter[HookPoint] = Counter()
        self.steered = 0
        self._prompt_gates: dict[int, bool] = {}
        self._read = ReadScores()
        self.onward = OnwardGates()

    def token(self, position: int) -> Array:
        """The state of the next token; told in their order."""
        request = self.request
        token, prompt_length = request.tokens[position], request.prompt_length
        read: dict[int, bool] = {}

        def is_open(place: int, when: When) -> bool:
            if when.scope == "token":
                return read[place]
            if when.scope == "onward":
                return self.onward.are_open(place, position)
            return position >= prompt_length - 1 and self._prompt_gates[place]

        x = EMBEDDING[token].double().numpy()
        points = set()
        for layer in range(LAYERS):
            out = np.tanh(x @ WEIGHTS[layer].double().numpy())
            for point in (HookPoint(layer, "mlp_out"), HookPoint(layer)):
                row = out if point.site == "mlp_out" else x + out
                for place, when in self._reading(point, position):
                    read[place] = self._opens(place, when, row)
                    if when.scope == "onward":
                        self.onward.tell(place, position, selected=True, in_range=read[place])
                    if when.scope == "prompt" and position == prompt_length - 1:
                        self._prompt_gates[place] = read[place]
                if request.spec is not None:
                    calls = _Counted(is_open)
                    row = REFERENCE.steer(
                        request.spec,
                        point,
                        row,
                        position,
                        prompt_length,
                        token,
                        calls,
                        request.seen,
                    )
                    if calls.acted(request, point, position):
                        points.add(point)
                if point.site == "mlp_out":
                    out = row
                else:
                    x = row
        self.touched.update(points)
        self.steered += bool(points)
        return x

    def _reading(self, point: HookPoint, position: int) -> list[tuple[int, When]]:
        """The gates, by the places of their interventions, that read this token at `point`."""
        request, spec = self.request, self.request.spec
        token, length = request.tokens[position], request.prompt_length
        found = []
        for place, item in enumerate(() if spec is None else spec.interventions):
            assert spec is not None
            when = item.when or spec.when
            if when is None or _read_at(when) != point:
                continue
            if (
                position < length
                if when.scope == "prompt"
                else chosen(spec, item, position, length, token, request.seen)
            ):
                found.append((place, when))
        return found

    def _opens(self, place: int, when: When, x: Array) -> bool:
        if isinstance(when, WhenDetected):
            self._read.tell(place, REFERENCE.score(when, x))
            return REFERENCE.fires(when, place, self._read)
        direction = REFERENCE.unit(str(when.vector), when.layer or 0)
        value = float(x @ direction)
        if when.measure == "cosine":
            value /= float(np.linalg.norm(x))
        return (when.above is None or value > when.above) and (
            when.below is None or value < when.below
        )


def _read_at(when: When) -> HookPoint:
    if isinstance(when, WhenDetected):
        return REFERENCE.detectors[when.detector].point
    return HookPoint(when.layer or 0)


class _Counted:
    """A gate function that can also say whether any intervention acted."""

    def __init__(self, is_open: Any) -> None:
        self._is_open = is_open

    def __call__(self, place: int, when: When) -> bool:
        return bool(self._is_open(place, when))

    def acted(self, request: Request, point: HookPoint, position: int) -> bool:
        spec, token = request.spec, request.tokens[position]
        assert spec is not None
        return any(
            point in REFERENCE.points(item)
            and chosen(spec, item, position, request.prompt_length, token, request.seen)
            and ((item.when or spec.when) is None or self(place, item.when or spec.when))
            for place, item in enumerate(spec.interventions)
        )


class Simulation:
    """A scheduler that does everything an engine may do, in random order."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.tables = Tables(shape_of(WIDTH, LAYERS), slots=SLOTS)
        self.ledger = Ledger(ROWS)
        self.rows = list(range(ROWS))
        self.running: list[Request] = []
        self.waits = self.preemptions = self.finished = self.opened = 0

    def run(self, requests: list[Request]) -> None:
        waiting = list(requests)
        while waiting or self.running:
            while waiting and self.rows and self.draw.random() < 0.7:
                if not self._admit(waiting[0]):
                    self.waits += 1
                    break
                waiting.pop(0)
            if self.running and self.draw.random() < 0.08:
                waiting.append(self._preempt(self.draw.choice(self.running)))
            if self.running and self.draw.random() < 0.03:
                self._leave(self.draw.choice(self.running))
            self.draw.shuffle(self.running)
            self._step()
            self._check_live_slots()

    def _admit(self, request: Request) -> bool:
        slot = 0
        if request.plan is not None:
            if not self.tables.can_acquire(request.plan):
                return False
            slot = self.tables.acquire(request.plan)
        row = self.rows.pop(self.draw.randrange(len(self.rows)))
        self.ledger.reset(row)
        prompt = request.tokens[: request.prompt_length]
        trace = None
        if request.plan is not None:
            trace = trace_of(request.plan.selections, prompt, request.roles)
        request.request = SteeredRequest(
            row, request.prompt_length, request.plan, slot, trace=trace
        )
        request.computed = 0
        self.running.append(request)
        return True

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        assert request.request is not None
        if request.plan is not None:
            self.tables.release(request.plan)
        self.rows.append(request.request.row)

    def _preempt(self, request: Request) -> Request:
        self._leave(request)
        self.preemptions += 1
        request.results.clear()
        return request

    def _step(self) -> None:
        chosen = [r for r in self.running if self.draw.random() < 0.8]
        spans, ids, offset = [], [], 0
        for request in chosen:
            assert request.request is not None
            left = len(request.tokens) - request.computed
            if request.computed > request.prompt_length and self.draw.random() < 0.2:
                self._draft(request)
            end = request.computed + self.draw.randint(1, left)
            offset += (gap := self.draw.randrange(3))
            ids += [0] * gap
            chunk = request.tokens[request.computed : end]
            places = np.arange(request.computed, end)
            spans.append(Span(request.request, offset, places, np.array(chunk)))
            ids += chunk
            offset += len(chunk)
        if not spans:
            return
        step = build_step(self.tables, self.ledger, spans, len(ids))
        x = EMBEDDING[torch.tensor(ids)]
        for layer in range(LAYERS):
            out = torch.tanh(x @ WEIGHTS[layer])
            out = out if step is None else step.edit(HookPoint(layer, "mlp_out"), out)
            x = x + out
            x = x if step is None else step.edit(HookPoint(layer), x)
        if step is not None:
            step.finish()
        for request, span in zip(chosen, spans, strict=True):
            for n, position in enumerate(span.positions):
                request.results[int(position)] = x[span.offset + n]
            request.computed = int(span.positions[-1]) + 1
            if request.computed == len(request.tokens):
                self._finish(request)

    def _draft(self, request: Request) -> None:
        """Tokens that another pass computed and that did not stay."""
        assert request.request is not None
        drafted = np.array([self.draw.randrange(VOCABULARY) for _ in range(3)])
        request.request.slots(np.arange(request.computed, request.computed + 3), drafted)

    def _finish(self, request: Request) -> None:
        truth = Truth(request)
        for position in range(len(request.tokens)):
            wanted = truth.token(position)
            actual = request.results[position].double().numpy()
            assert np.abs(actual - wanted).max() <= 1e-4 * (1 + np.abs(wanted).max())
        assert request.request is not None
        if request.plan is not None:
            self._check_counts(request.plan, self.ledger.tokens[request.request.row], truth)
            self._check_onsets(request.plan, self.ledger.onset[request.request.row], truth)
        self._leave(request)
        self.finished += 1

    def _check_counts(self, plan: SteeringPlan, counts: Any, truth: Truth) -> None:
        assert int(counts[1:].sum()) == truth.steered
        bits = np.arange(len(counts))
        for point in plan.points:
            touching = sum(1 << n for n, one in enumerate(plan.rules) if point in one.blocks)
            assert int(counts[(bits & touching) != 0].sum()) == truth.touched[point]

    def _check_onsets(self, plan: SteeringPlan, onset: torch.Tensor, truth: Truth) -> None:
        """Every onward gate that opened is a rule's, and every rule's is one of the spec's."""
        rules = [n for n, one in enumerate(plan.rules) if one.gate and one.gate.onward]
        opened = {int(onset[n]) for n in rules if onset[n] != SHUT}
        assert opened == set(truth.onward.onsets.values())
        assert (np.delete(onset.numpy(), rules) == SHUT).all()
        self.opened += len(opened)

    def _check_live_slots(self) -> None:
        """A slot that a running request refers to still means that request's plan."""
        held = {r.plan.fingerprint: r for r in self.running if r.plan is not None}
        assert self.tables.in_use == len(held) <= SLOTS
        slots = {r.request.slot for r in held.values() if r.request is not None}
        assert len(slots) == len(held)
        for request in held.values():
            assert request.request is not None
            assert request.plan is not None
            for number, one in enumerate(request.plan.rules):
                for point, block in one.blocks.items():
                    table = self.tables.at(point)[number]
                    assert table is not None
                    assert table.blocks[request.request.slot] is block
                    owned = table.owner == request.request.slot
                    assert int(owned.sum()) == block.n_edits
                    if block.read is not None:
                        assert torch.equal(table.read[owned], block.read)


def random_gate(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.4:
        return random_detection(draw)
    side = draw.choice(["above", "below"])
    return {
        "vector": f"v{draw.randrange(6)}",
        side: draw.uniform(-0.2, 0.2),
        "scope": draw.choice(SCOPES),
        "measure": draw.choice(["cosine", "projection"]),
        "layer": 0,
    }


def random_plan(draw: random.Random, spans: bool) -> tuple[SteeringSpec, SteeringPlan]:
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=draw.choice([1, 2, 4]))
        if spans:
            raw["where"] = random_spans(draw, VOCABULARY)
        for item in raw["interventions"]:
            if "layers" in item and draw.random() < 0.2:
                item["site"] = "mlp_out"
            # A gate reads layer 0, so it can only rule what comes after.
            if spans and draw.random() < 0.6:
                item["where"] = random_spans(draw, VOCABULARY)
            if draw.random() < 0.3 and 0 not in item.get("layers", [1]):
                item["when"] = random_gate(draw)
        try:
            spec = parse_spec(raw)
            return spec, PLANS.plan(spec)
        except SteerError:
            continue


def random_requests(draw: random.Random, count: int, *, spans: bool = False) -> list[Request]:
    kinds = [random_plan(draw, spans) for _ in range(7)]
    requests = []
    for _ in range(count):
        # A few are long, so that one request makes up most of a batch and others a token each.
        prompt_length = draw.randint(30, 50) if draw.random() < 0.15 else draw.randint(1, 8)
        length = prompt_length + draw.randint(0, 25 if spans else 6)
        tokens = [draw.randrange(VOCABULARY) for _ in range(length)]
        spec, plan = draw.choice(kinds) if draw.random() < 0.8 else (None, None)
        roles = random_roles(draw, prompt_length) if spans else None
        requests.append(Request(prompt_length, tokens, spec, plan, roles=roles))
    return requests


@pytest.mark.parametrize("seed", range(25))
def test_every_token_gets_exactly_its_own_requests_edits(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(random_requests(random.Random(1_000 + seed), 25))
    assert simulation.finished >= 15
    assert simulation.tables.in_use == 0
    assert sorted(simulation.rows) == list(range(ROWS))


@pytest.mark.parametrize("seed", range(25))
def test_spans_are_met_in_whatever_pieces_their_tokens_come(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(random_requests(random.Random(2_000 + seed), 25, spans=True))
    assert simulation.finished >= 15


def _wheres(spec: SteeringSpec) -> list[Where | None]:
    return [spec.where, *(item.where for item in spec.interventions)]


def test_the_simulation_of_spans_meets_what_it_is_about() -> None:
    """Every field selects some tokens and leaves others, in prompts and in answers."""
    met: set[tuple[str, bool, bool]] = set()
    for seed in range(8):
        for request in random_requests(random.Random(2_000 + seed), 25, spans=True):
            for where in () if request.spec is None else _wheres(request.spec):
                for name in where.model_fields_set - {"except_"} if where else ():
                    alone = Where.model_validate({name: getattr(where, name)})
                    for place, token in enumerate(request.tokens):
                        told = (place, request.prompt_length, token, request.seen)
                        generated = place >= request.prompt_length
                        met.add((name, generated, selected(alone, *told)))
    assert met >= {
        (name, generated, chosen)
        for name in ("after", "before", "between", "outside", "every", "roles")
        for generated in (False, True)
        for chosen in (False, True)
        if (name, generated, chosen) != ("every", False, True)
    }


def test_the_simulation_meets_what_it_is_about() -> None:
    """Waiting for slots, preemption, gates of all scopes, clamps that compete: all occur."""
    waits = preemptions = opened = 0
    specs: list[SteeringSpec] = []
    for seed in range(30):
        requests = random_requests(random.Random(1_000 + seed), 25)
        specs += [r.spec for r in requests if r.spec is not None]
        simulation = Simulation(seed)
        simulation.run(requests)
        waits += simulation.waits
        preemptions += simulation.preemptions
        opened += simulation.opened
    gates = [item.when for spec in specs for item in spec.interventions if item.when]
    clamps = [i for spec in specs for i in spec.interventions if i.kind == "clamp"]
    assert waits > 20
    assert preemptions > 10
    assert opened > 20
    assert {(type(gate), gate.scope) for gate in gates} == {
        (kind, scope) for kind in (WhenDirection, WhenDetected) for scope in SCOPES
    }
    detected = [gate for gate in gates if isinstance(gate, WhenDetected)]
    assert {gate.detector for gate in detected} == MADE["detectors"].keys()
    pooled = {n for n, one in MADE["detectors"].items() if one.detection.last > 1}
    assert {gate.scope for gate in detected if gate.detector in pooled} == set(SCOPES)
    assert sum(clamp.sae.startswith("topk") for clamp in clamps) > 10
    assert {clamp.sae for clamp in clamps} == set(SAE_NAMES)
