"""The edit kernel and its static buffers, run by Triton's interpreter, against the torch form.

Both forms are shown the same halves of the stream at every tap of a small model while random
requests come, go, wait and are preempted; states and ledgers must agree after every pass.
"""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import (
    CLAMPS,
    EVERYTHING,
    MODES,
    NORMALISATIONS,
    SCOPES,
    artefacts,
    clamps_of,
    random_detection,
    random_detector,
    random_spec,
    random_transcoder,
    random_vector,
    shape_of,
)
from float64_reference import Float64Reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.encoders import LatentRows, TopKEncoder
from steer.batch.ledger import SHUT, PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.edits import (
    LAW_FIELDS,
    LOWER,
    TO_NORM,
    TO_PLANE,
    UPPER,
    Block,
    Law,
    apply,
)
from steer.engines.vllm.static import form as static_form
from steer.engines.vllm.static import operators
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.kernel import group, launch
from steer.engines.vllm.static.operators import set_form
from steer.engines.vllm.static.rows import rows_needed
from steer.engines.vllm.static.tables import StaticTables
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.taps import SITES, points_of, tap_of
from steer.errors import CapacityError, EngineError, SteerError, TooLarge, Unsupported
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import Rule, SteeringPlan
from steer.plan.selection import EVERYWHERE
from steer.spec import parse_spec

WIDTH, LAYERS, VOCABULARY, LONGEST = 24, 2, 64, 64
TAPS = range(2 * LAYERS + 1)
SLOTS, ROWS, BATCH, REQUESTS = 4, 8, 64, 20
DRAFTS = 3
MODEL = replace(shape_of(WIDTH, LAYERS), sites=SITES)
MADE = artefacts(WIDTH, LAYERS)
MADE["vectors"] |= {
    f"{site}-{n}": random_vector(60 + n, *range(LAYERS), width=WIDTH, site=site)
    for site in ("mlp_out", "resid_mid")
    for n in range(2)
}
MADE["detectors"]["d1"] = random_detector(95, 1, width=WIDTH, bias=0.5, site="resid_mid")
TRANSCODERS = {
    f"{name}.{site}.{write_site}": random_transcoder(
        name, seed=90 + n, width=WIDTH, site=site, write_site=write_site, W_skip=None
    )
    for n, (name, site, write_site) in enumerate(
        (
            ("jumprelu", "resid_mid", "mlp_out"),
            ("topk-centred", "resid_mid", "mlp_out"),
            ("abstopk", "resid_mid", "resid_post"),
            ("jumprelu-rescaled", "mlp_out", "resid_post"),  # in one launch
            ("topk", "mlp_out", "resid_post"),
        )
    )
}
READ_MODES = ("set", "at_least", "drop", "add in balance", "set where active", "set a share")
MADE["saes"] |= TRANSCODERS
REFERENCE = Float64Reference(**MADE)
PLANS = PlanCache(MemoryLibrary(**MADE), MODEL, EVERYTHING)
_generator = torch.Generator().manual_seed(12)
EMBEDDING = torch.randn(VOCABULARY, WIDTH, generator=_generator)
WEIGHTS = torch.randn(len(TAPS), WIDTH, WIDTH, generator=_generator) / WIDTH**0.5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def plan_of(*interventions: dict[str, Any], **fields: Any) -> SteeringPlan:
    return PLANS.plan(parse_spec({"interventions": list(interventions), **fields}))


def make_form(
    ledger: PositionLedger, *, taps: Any = TAPS, edit_rows: int = 128, programs: int = 1
) -> StaticForm:
    form = StaticForm(
        MODEL,
        taps,
        max_requests=SLOTS,
        batch_tokens=BATCH,
        edit_rows=edit_rows,
        device=torch.device("cpu"),
        latents=64 * BATCH,
    )
    form.buffers.programs = programs
    form.bind(lambda: ledger)
    return form


def no_fault(message: str) -> None:
    raise AssertionError(message)


# The two forms side by side


@dataclass
class Request:
    prompt_length: int
    tokens: list[int]
    plan: SteeringPlan | None
    measure: bool = False
    row: int = -1
    computed: int = 0
    slots: tuple[int, int] | None = None


class Simulation:
    """Random passes over random requests, computed by both forms."""

    def __init__(
        self, seed: int, dtype: torch.dtype, *, split: bool = True, programs: int = 1
    ) -> None:
        self.draw, self.dtype, self.split = random.Random(seed), dtype, split
        self.tables = Tables(MODEL, slots=SLOTS)
        self.ledgers = [
            PositionLedger(ROWS, LONGEST, torch.device("cpu"), drafts=DRAFTS) for _ in range(2)
        ]
        self.form = make_form(self.ledgers[1], programs=programs)
        self.free = list(range(ROWS))
        self.running: list[Request] = []
        self.windows = self.resumed = self.untouched = self.edited = self.rejected = 0
        self.opened = 0
        """Onward gates that a request's ledger holds open, counted after each pass."""

    def run(self, requests: list[Request]) -> None:
        waiting = list(requests)
        while waiting or self.running:
            while waiting and len(self.running) < SLOTS and self.draw.random() < 0.7:
                self._admit(waiting.pop())
            if self.running and self.draw.random() < 0.15:
                self._preempt(self.draw.choice(self.running))
            self.draw.shuffle(self.running)
            self._pass()

    def _admit(self, request: Request) -> None:
        request.row = self.free.pop(self.draw.randrange(len(self.free)))
        for ledger in self.ledgers:
            ledger.reset(request.row)
        self.running.append(request)

    def _steered(self, request: Request) -> tuple[SteeredRequest, SteeredRequest]:
        if request.plan is not None and request.slots is None:
            tables = (self.tables, self.form.tables)
            first, second = (table.acquire(request.plan) for table in tables)
            request.slots = first, second
        first, second = request.slots or (0, 0)
        request = SteeredRequest(
            request.row, request.prompt_length, request.plan, first, request.measure
        )
        return request, replace(request, slot=second)

    def _free_slots(self, request: Request) -> None:
        if request.plan is not None and request.slots is not None:
            self.tables.release(request.plan)
            self.form.tables.release(request.plan)
            request.slots = None

    def _preempt(self, request: Request) -> None:
        """Takes slots and states away; a cached beginning of any length is not computed again."""
        self._free_slots(request)
        self._settle([request])
        request.computed = self.draw.randint(0, request.computed)
        self.resumed += request.computed >= request.prompt_length

    def _pass(self) -> None:
        chosen = [r for r in self.running if self.draw.random() < 0.8]
        spans: tuple[list[Span], list[Span]] = ([], [])
        ids: list[int] = []
        self._settle(chosen)
        for request in chosen:
            left = len(request.tokens) - request.computed
            # A token behind others of its request, whose gate is onward, is no kernel's.
            onward = request.plan is not None and request.plan.onward
            end = request.computed + (1 if onward else self.draw.randint(1, left))
            positions = np.arange(request.computed, end)
            chunk, stayed = self._drafted(request, end)
            for found, steered in zip(spans, self._steered(request), strict=True):
                found.append(Span(steered, len(ids), positions, np.array(chunk)))
            ids += chunk
            self.windows += request.computed < request.prompt_length < end
            request.computed = stayed
        if not ids:
            return
        self._compute(spans, ids)
        for request in chosen:
            if request.computed == len(request.tokens):
                self.running.remove(request)
                self._free_slots(request)
                self.free.append(request.row)

    def _drafted(self, request: Request, end: int) -> tuple[list[int], int]:
        """The tokens of a pass up to `end`, some of them drafted, and how far they stay; the first
        that does not is another token than the request goes on with, as are those behind it."""
        chunk = request.tokens[request.computed : end]
        first = max(request.computed + 1, request.prompt_length, end - DRAFTS)
        if first >= end or self.draw.random() < 0.5:
            return chunk, end
        for ledger in self.ledgers:
            ledger.draft(np.array([request.row]), np.array([first]), np.array([end - first]))
        stayed = self.draw.randint(first, end)
        others = [self.draw.randrange(VOCABULARY) for _ in range(end - stayed)]
        self.rejected += len(others)
        return chunk[: len(chunk) - len(others)] + others, stayed

    def _settle(self, requests: list[Request]) -> None:
        self.form.collect(wait=True)
        for request in requests:
            for ledger in self.ledgers:
                ledger.settle(np.array([request.row]), np.array([request.computed]))

    def _compute(self, spans: tuple[list[Span], list[Span]], ids: list[int]) -> None:
        total = len(ids)
        step = build_step(self.tables, self.ledgers[0], spans[0], total)
        reference = ForwardPass(step, total, LAYERS)
        running = self.form.begin(spans[1], total, no_fault)
        assert (running is None) == (step is None)
        rows = np.full(total, -1, dtype=np.int64)
        positions = np.zeros(total, dtype=np.int64)
        # A plan may have no rules: a ramp that is 0 throughout edits nothing.
        for span in (span for span in spans[0] if span.request.rules):
            rows[span.place], positions[span.place] = span.request.row, span.positions
        self.ledgers[0].expect(rows, positions)
        states = self._states(ids, reference)
        if running is not None:
            running.finish()
        reference.finish()
        self._same_ledgers()
        self._same_bits(spans[1], states)

    def _states(self, ids: list[int], reference: ForwardPass) -> list[list[tuple[Tensor, Tensor]]]:
        """What the form makes of both halves at each tap, beside what it was shown."""
        padding = self.draw.randrange(4)
        batch = len(ids) + padding
        hidden = EMBEDDING[torch.tensor([*ids, *[0] * padding])].to(self.dtype)
        residual = torch.randn(batch, WIDTH, generator=_generator).to(self.dtype)
        found = []
        for tap in TAPS:
            shown = [hidden, residual] if self.split else [hidden]
            # Not contiguous: the rows of a wider tensor.
            mine = [torch.cat([half, half], dim=1)[:, :WIDTH] for half in shown]
            self.form.edit(tap, mine[0], mine[1] if self.split else None)
            wanted = [half.clone() for half in shown]
            if tap in reference.taps:
                reference.visit(tap, wanted[0], wanted[1] if self.split else None)
            for actual, expected in zip(mine, wanted, strict=True):
                close(actual, expected, TOLERANCE[self.dtype])
            found.append(list(zip(shown, mine, strict=True)))
            stream = wanted[0] + wanted[1] if self.split else wanted[0]
            part = torch.tanh(stream.float() @ WEIGHTS[tap]).to(self.dtype)
            hidden, residual = (part, stream) if self.split else (part + stream, residual)
        return found

    def _same_ledgers(self) -> None:
        reference, actual = self.ledgers
        assert np.array_equal(reference.applied, actual.applied)
        assert np.array_equal(reference.tokens, actual.tokens)
        assert torch.equal(reference.gate_open, actual.gate_open)
        assert torch.equal(reference.onset, actual.onset)
        self.opened += int((actual.onset != SHUT).sum())
        close(actual.gate_value, reference.gate_value, TOLERANCE[self.dtype])
        for row in range(ROWS):
            for point, sizes in reference.relative.items():
                mean = sizes.mean(row)
                if mean is None:
                    assert point not in actual.relative or actual.relative[point].mean(row) is None
                else:
                    found = torch.tensor(actual.relative[point].mean(row))
                    close(found, torch.tensor(mean), 10 * TOLERANCE[self.dtype])

    def _same_bits(self, spans: list[Span], states: list[list[tuple[Tensor, Tensor]]]) -> None:
        """A token on which no pass acted at a tap is what it was, to the bit; so is padding."""
        for tap, halves in zip(TAPS, states, strict=True):
            touched = torch.zeros(len(halves[0][0]), dtype=torch.bool)
            for span in spans:
                plan = span.request.plan
                for n, position in enumerate(span.positions):
                    bits = int(self.ledgers[1].applied[span.request.row, position]) if plan else 0
                    touched[span.offset + n] = plan is not None and any(
                        bits >> number & 1
                        for number, one in enumerate(plan.rules)
                        for point in one.blocks
                        if tap_of(point) == tap
                    )
            for before, after in halves:
                assert torch.equal(before[~touched], after[~touched])
            self.untouched += int((~touched).sum())
            self.edited += int(touched.sum())


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.float(), expected.float()
    scale = 1 + expected.nan_to_num().abs().max().item()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert (actual - expected).nan_to_num().abs().max().item() <= tolerance * scale


def random_when(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.4:
        return random_detection(draw)
    name = draw.choice(["v0", "v1", "mlp_out-0", "mlp_out-1", "resid_mid-0"])
    return {
        "vector": name,
        draw.choice(["above", "below"]): draw.uniform(-0.2, 0.2),
        "scope": draw.choice(SCOPES),
        "measure": draw.choice(["cosine", "projection"]),
        "layer": draw.randrange(LAYERS),
    }


def random_plan(draw: random.Random) -> SteeringPlan:
    """Any kind at any site, gated or not; what no kernel does, or the tables cannot hold, is drawn
    again."""
    tables = StaticTables(MODEL, [points_of(tap, LAYERS) for tap in TAPS], slots=1, edit_rows=128)
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=4)
        for item in raw["interventions"]:
            if "layers" in item and draw.random() < 0.6:
                item["site"] = draw.choice(SITES)
                item["layers"] = [draw.randrange(LAYERS)]
            if draw.random() < 0.5:
                item["when"] = random_when(draw)
        try:
            plan = PLANS.plan(parse_spec(raw))
            tables.check(plan)
        except SteerError:
            continue
        if plan.pooled:
            continue  # no kernel's
        return plan


def onward_plan(draw: random.Random) -> SteeringPlan:
    """Any plan with an onward gate."""
    return next(plan for plan in iter(lambda: random_plan(draw), None) if plan.onward)


def ranking_plan(draw: random.Random) -> SteeringPlan:
    """Features of a TopK SAE, clamped once or twice among other edits."""
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=3)
        for name in draw.sample(["clamp-topk", "clamp-topk-scale"], draw.randint(1, 2)):
            place = draw.randint(0, len(raw["interventions"]))
            gated = {"when": random_when(draw)} if draw.random() < 0.4 else {}
            raw["interventions"].insert(place, {**KINDS[name], **gated})
        try:
            return PLANS.plan(parse_spec(raw))
        except SteerError:
            continue


def reading_plan(draw: random.Random) -> SteeringPlan:
    """Clamps of transcoders, one or two among other edits, behind gates or not."""
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=2)
        for name in draw.sample(list(TRANSCODERS), draw.randint(1, 2)):
            place = draw.randint(0, len(raw["interventions"]))
            mode = draw.choice(["set", "at_least", "scale", "add in balance", "set where active"])
            clamp = {"kind": "clamp", "sae": name, "features": [3, 60, 17, 8, 21], **MODES[mode]}
            gated = {"when": random_when(draw)} if draw.random() < 0.3 else {}
            raw["interventions"].insert(place, {**clamp, **gated})
        try:
            plan = PLANS.plan(parse_spec(raw))
        except SteerError:
            continue
        if not plan.graphless:
            return plan


def random_requests(
    draw: random.Random,
    count: int,
    draw_plan: Callable[[random.Random], SteeringPlan] = random_plan,
) -> list[Request]:
    plans = [draw_plan(draw) for _ in range(6)]
    requests = []
    for _ in range(count):
        prompt_length = draw.randint(1, 6)
        tokens = [draw.randrange(VOCABULARY) for _ in range(prompt_length + draw.randint(0, 10))]
        plan = draw.choice(plans) if draw.random() < 0.85 else None
        requests.append(Request(prompt_length, tokens, plan, draw.random() < 0.3))
    return requests


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
    gates, every kind."""
    monkeypatch.setattr(Simulation, "_compute", lambda *_: None)
    windows = resumed = detecting = rejected = 0
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
        scopes.update(gate.scope for gate in gates)
        detecting += sum(gate.bias != 0 for gate in gates)
        plans |= {plan.fingerprint for plan in steered}
        kinds |= {item.kind for plan in steered for item in plan.spec.interventions}
    assert windows > 10
    assert resumed > 5
    assert rejected > 20
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
        half = torch.randn(stop - start + 2, WIDTH, generator=_generator)
        other = torch.randn(half.shape, generator=_generator) if split else None
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


SIGNED = {
    f"clamp-{mode}-abstopk{suffix}": clamps_of([f"abstopk{suffix}"])[
        f"clamp {mode} abstopk{suffix}"
    ]
    for suffix, mode in itertools.product(NORMALISATIONS, ("at_least", "set where active"))
}
KINDS: dict[str, dict[str, Any]] = {
    "add": {"kind": "add", "vector": "v0", "strength": 1.5, "layers": [1]},
    "add-norm": {"kind": "add", "vector": "v0", "strength": {"norm": 0.3}, "layers": [1]},
    "ablate": {"kind": "ablate", "vector": "v1", "strength": 0.7, "layers": [1]},
    "project-set": {"kind": "project", "vector": "v2", "value": 2.0, "layers": [1]},
    "project-most": {
        "kind": "project", "vector": "v2", "value": 0.1, "mode": "at_most", "layers": [1],
    },
    "clamp-topk": {"kind": "clamp", "sae": "topk", "features": [1, 5, 9, 30], "value": 1.5},
    **{name.replace(" ", "-"): clamp for name, clamp in CLAMPS.items()},
    **{name.replace(" ", "-"): clamp for name, clamp in SIGNED.items()},
    "clamp-topk-scale": {
        "kind": "clamp", "sae": "topk", "features": [*range(16)], "value": 3.0, "mode": "scale",
    },
    "swap": {"kind": "swap", "remove": "v3", "add": "v4", "strength": 0.4, "layers": [1]},
    "exchange": {
        "kind": "exchange", "vector": "v0", "toward": "v2", "mode": "one_way", "layers": [1],
    },
    "read_write": {
        "kind": "read_write", "read": "v4", "write": "v0", "bias": 0.3, "strength": 0.2,
        "layers": [1],
    },
    "read_write-cosine": {
        "kind": "read_write", "read": "v4", "write": "v0", "measure": "cosine", "threshold": 0.05,
        "strength": {"norm": -1.2}, "layers": [1],
    },
    "low_rank": {"kind": "low_rank", "adapter": "lora", "layers": [1]},
    "low_rank-relu": {"kind": "low_rank", "adapter": "rectified", "layers": [1]},
    "affine": {"kind": "affine", "map": "map", "strength": 0.7, "layers": [1]},
    "rotate-to": {
        "kind": "rotate", "vector": "v1", "toward": "v5", "degrees": 70.0, "mode": "to",
        "layers": [1],
    },
    "rotate-side": {
        "kind": "rotate", "vector": "v5", "toward": "v2", "degrees": 20.0, "mode": "to",
        "only": "positive", "layers": [1],
    },
    "rotate": {"kind": "rotate", "vector": "v1", "toward": "v5", "degrees": 70.0, "layers": [1]},
    "patch": {"kind": "patch", "vector": "v3", "layers": [1]},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("norm", "ramp"),
    [(None, None), ("preserve", None), ("preserve", [[0, 0.3]])],
)
def test_every_kind_is_what_its_paper_says(
    name: str, norm: str | None, ramp: list[list[float]] | None
) -> None:
    spec = parse_spec({"interventions": [KINDS[name]], "norm": norm, "ramp": ramp})
    plan = PLANS.plan(spec)
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    request = SteeredRequest(0, 5, plan, form.tables.acquire(plan))
    x = torch.randn(5, WIDTH, generator=_generator)
    running = form.begin([Span(request, 0, np.arange(5), np.arange(5))], 5, no_fault)
    assert running is not None
    half = 0.4 * x
    other = x - half
    form.edit(tap_of(HookPoint(1)), half, other)
    for position, row in enumerate(x.double().numpy()):
        wanted = REFERENCE.steer(spec, HookPoint(1), row, position, 5, position)
        actual = (half + other)[position].double().numpy()
        assert np.abs(actual - wanted).max() <= 1e-5 * (1 + np.abs(wanted).max())


@pytest.mark.parametrize("mode", READ_MODES)
@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_clamp_of_a_transcoder_is_that_of_the_whole_one(name: str, mode: str) -> None:
    """Read in one launch and written in another, or in the same."""
    item = {"kind": "clamp", "sae": name, "features": [3, 60, 17, 8, 21], **MODES[mode]}
    spec, sae = parse_spec({"interventions": [item]}), TRANSCODERS[name]
    if "share" in mode and sae.measure != "product":
        return  # there is no such clamp: it would have two lengths
    plan, read, written = PLANS.plan(spec), HookPoint(1, sae.site), sae.write_point
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")))
    request = SteeredRequest(0, 5, plan, form.tables.acquire(plan))
    assert form.begin([Span(request, 0, np.arange(5), np.arange(5))], 5, no_fault) is not None
    # The state where it is read in an earlier launch; the part and the stream of the last one.
    x, part, stream = torch.randn(3, 5, WIDTH, generator=_generator)
    if read.site == "mlp_out":
        x = part.clone()
    else:
        form.edit(tap_of(read), x / 3, x - x / 3)
    before = part.clone() if written.site == "mlp_out" else part + stream
    form.edit(tap_of(written), part, stream)
    actual = part if written.site == "mlp_out" else part + stream
    for found, old, row in zip(actual, before, x, strict=True):
        wanted = REFERENCE.clamped(
            spec.interventions[0], old.double().numpy(), row.double().numpy()
        )
        assert np.abs(found.double().numpy() - wanted).max() <= 1e-5 * (1 + np.abs(wanted).max())


@pytest.mark.parametrize("programs", [1, 18])
@pytest.mark.parametrize("latents", ["apart", "tied", "closed"])
@pytest.mark.parametrize("k", [1, 6, 39, 40])
def test_a_feature_is_active_where_the_reference_has_it(
    programs: int, latents: str, k: int
) -> None:
    """Small whole numbers, whose products are exact whatever the order of their sum."""
    size, clamped = 40, [0, 1, 7, 20, 39]
    read = torch.randint(-3, 4, (size, WIDTH), generator=_generator).float()
    if latents == "tied":
        read[1::2] = read[::2]
    bias = torch.full((size,), -1000.0) if latents == "closed" else read[:, 0].clone()
    laws = [Law.scaled(3.0, bias=bias[n].item(), threshold=0.0) for n in clamped]
    write = torch.randint(-1, 2, (len(clamped), WIDTH), generator=_generator).float()
    before = Block(shift=torch.ones(WIDTH))
    ranking = Block.of_edits(
        read[clamped], write, laws, encoder=TopKEncoder("whole numbers", LatentRows(read, bias), k)
    )
    rules = tuple(Rule(EVERYWHERE, None, {HookPoint(1): one}) for one in (before, ranking, ranking))
    plan = replace(plan_of(KINDS["clamp-topk"]), fingerprint="k", rules=rules)
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")), programs=programs)
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    assert form.begin([Span(request, 1, np.arange(4), np.arange(4))], 5, no_fault) is not None
    x = torch.randint(-3, 4, (6, WIDTH), generator=_generator).float()
    wanted = x.clone()
    for block in (before, ranking, ranking):
        wanted[1:5] = apply(block, wanted[1:5])
    form.edit(tap_of(HookPoint(1)), x, None)
    assert torch.equal(x, wanted)
    assert not form.buffers.arrived.any()


@pytest.mark.parametrize("width", [1, 7, 96, 1000, 16384])
def test_rows_of_any_width(width: int) -> None:
    model = replace(shape_of(width, 1), sites=("resid_post",))
    point = HookPoint(0)
    rows = torch.randn(10, width, generator=_generator) / width**0.5
    read, write, channels = rows[:2], rows[2:4], rows[4:8]
    channels[LOWER], channels[UPPER] = -channels[UPPER].abs() - 0.5, torch.inf
    laws = torch.tensor([Law(0.1, -0.2, 0.3, 0.4, -1.0, 1.0, TO_NORM, 1.0), Law(relative=TO_PLANE)])
    block = Block(rows[8], read, write, laws, channels, side=rows[9], preserve_norm=True)
    plan = replace(
        plan_of(KINDS["ablate"]), rules=(Rule(EVERYWHERE, None, {point: block}),), fingerprint="w"
    )
    ledger = PositionLedger(1, 4, torch.device("cpu"))
    form = StaticForm(
        model, [2], max_requests=1, batch_tokens=4, edit_rows=4, device=torch.device("cpu")
    )
    form.bind(lambda: ledger)
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    x = torch.randn(3, width, generator=_generator)
    wanted = torch.cat([apply(block, x[:2]), x[2:]])
    form.begin([Span(request, 0, np.arange(2), np.arange(2))], 2, no_fault)
    form.edit(2, x, None)
    close(x, wanted, 1e-5)
    assert torch.equal(x[2], wanted[2])


def test_a_row_without_a_direction_has_no_norm_to_keep() -> None:
    """What is rescaled is zero: it stays zero, and is not 0 · ∞."""
    block = Block(shift=torch.zeros(WIDTH), replace=True, preserve_norm=True)
    plan = replace(plan_of(KINDS["patch"]), rules=(Rule(EVERYWHERE, None, {HookPoint(1): block}),))
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")))
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    x = torch.full((2, WIDTH), 10.0)
    form.begin([Span(request, 0, np.arange(2), np.arange(2))], 2, no_fault)
    form.edit(tap_of(HookPoint(1)), x, None)
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("split", [True, False])
def test_a_row_that_an_edit_drives_beyond_all_numbers_is_left_and_its_request_known(
    split: bool,
) -> None:
    """Once, in a pass that is carried on; a row that was beyond them before is nobody's fault."""
    ledger = PositionLedger(3, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    edit = Block.of_edits(torch.zeros(1, WIDTH), torch.ones(1, WIDTH), [Law.constant(3e38)])
    made = plan_of(KINDS["ablate"])
    plan = replace(made, fingerprint="over", rules=(Rule(EVERYWHERE, None, {HookPoint(1): edit}),))
    harmless = plan_of(KINDS["add"])
    spans = [
        Span(SteeredRequest(row, 2, one, form.tables.acquire(one)), row, np.array([2]), np.ones(1))
        for row, one in ((0, harmless), (1, plan), (2, plan))
    ]
    running = form.begin(spans, 3, no_fault)
    assert running is not None
    for _ in range(2):
        x = torch.randn(3, WIDTH, generator=_generator)
        x[2] = float("inf")
        before, halves = x.clone(), (x, torch.zeros_like(x)) if split else (x, None)
        for tap in TAPS:
            form.edit(tap, *halves)
        running.finish()
        stream = x if halves[1] is None else x + halves[1]
        assert torch.equal(stream[1], before[1])
        assert not torch.equal(stream[0], before[0])
    assert not any(ledger.runs_over(row, 3) for row in range(3))  # nobody has waited
    form.collect(wait=True)
    assert [ledger.runs_over(row, 3) for row in range(3)] == [False, True, False]
    assert not ledger.runs_over(1, 2)


# Graphs


class Recorder:
    """Stands in for the kernel: takes down its launches, as a graph that is being captured."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: self.launches.append((grid, args, named))

    def replay(self) -> None:
        for grid, args, named in self.launches:
            self.kernel[grid](*args, **named)


class NoOperations(TorchDispatchMode):
    """Fails on any operation on tensors: allocations, copies, looks at data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def test_a_replayed_graph_steers_by_what_the_buffers_say_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launches are captured once, with nobody steered, and run again for other batches."""
    ledgers = [PositionLedger(ROWS, LONGEST, torch.device("cpu")) for _ in range(2)]
    form, tables = make_form(ledgers[1]), Tables(MODEL, slots=SLOTS)
    recorder = Recorder(group.edit_tokens)
    monkeypatch.setattr(launch, "edit_tokens", recorder)
    halves = [(torch.zeros(8, WIDTH), torch.zeros(8, WIDTH)) for _ in TAPS]
    set_form(form)
    with NoOperations():
        for tap, (hidden, residual) in zip(TAPS, halves, strict=True):
            operators.edit_pair(hidden, residual, tap)
    set_form(None)
    assert len(recorder.launches) == len(TAPS)

    draw = random.Random(3)
    drawn = (random_plan(draw) for _ in range(100))
    plans = [plan for plan in drawn if not plan.onward][: 3 * SLOTS]  # of each three tokens
    results = []
    for number in range(0, len(plans), 2):
        spans: tuple[list[Span], list[Span]] = ([], [])
        for row, plan in enumerate(plans[number : number + 2]):
            for found, table in zip(spans, (tables, form.tables), strict=True):
                request = SteeredRequest(row, 2, plan, table.acquire(plan))
                found.append(Span(request, 3 * row, np.arange(3), np.array([4, 5, 6])))
                ledgers[0].reset(row)
                ledgers[1].reset(row)
        reference = ForwardPass(build_step(tables, ledgers[0], spans[0], 6), 6, LAYERS)
        running = form.begin(spans[1], 6, no_fault)
        assert running is not None
        shown = torch.randn(2, 8, WIDTH, generator=_generator)
        for hidden, residual in halves:
            hidden.copy_(shown[0])
            residual.copy_(shown[1])
        recorder.replay()
        running.finish()
        for tap, (hidden, residual) in zip(TAPS, halves, strict=True):
            wanted = shown.clone()
            if tap in reference.taps:
                reference.visit(tap, wanted[0], wanted[1])
            close(hidden, wanted[0], 1e-5)
            close(residual, wanted[1], 1e-5)
        results.append(halves[-1][1] - shown[1])
        for plan in plans[number : number + 2]:
            tables.release(plan)
            form.tables.release(plan)
    assert any(result.abs().max() > 0.1 for result in results)

    form.clear()
    shown = torch.randn(8, WIDTH, generator=_generator)
    for half in (half for pair in halves for half in pair):
        half.copy_(shown)
    recorder.replay()
    assert all(torch.equal(half, shown) for pair in halves for half in pair)


def test_the_operators_are_traced_and_change_their_arguments() -> None:
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    plan = plan_of(KINDS["ablate"], KINDS["add"])
    request = SteeredRequest(0, 4, plan, form.tables.acquire(plan))
    form.begin([Span(request, 0, np.arange(4), np.arange(4))], 4, no_fault)
    tap = tap_of(HookPoint(1))

    def layer(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = hidden * 2, residual + 1
        torch.ops.steer.edit_pair(hidden, residual, tap)
        alone = residual.clone()
        torch.ops.steer.edit_one(alone, tap)
        return residual - 1, alone

    given = torch.randn(2, 6, WIDTH, generator=_generator)
    set_form(form)
    try:
        wanted = layer(*given.clone())
        traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = traced(*given.clone())
    finally:
        set_form(None)
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
    assert not torch.equal(wanted[0][:4], given[1][:4])
    with pytest.raises(EngineError, match="before its tables"):
        torch.ops.steer.edit_one(given[0], tap)


def test_halves_of_another_shape_are_refused() -> None:
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")))
    for hidden in (
        torch.zeros(2, WIDTH + 1),
        torch.zeros(BATCH + 1, WIDTH),
        torch.zeros(WIDTH, 2).T,
        torch.zeros(1, 2, WIDTH),
    ):
        with pytest.raises(EngineError) as caught:
            form.edit(0, hidden, None)
        assert caught.value.code == "unexpected_shape"


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """To machine code, by Triton's own compiler, on whatever machine the tests run."""
    script = tmp_path / "compiled.py"
    script.write_text(_COMPILED)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "90", "90", "100"]


_COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steer.engines.vllm.static.kernel.group import edit_tokens
from steer.engines.vllm.static.kernel.launch import launch_shape

FLOATS = {"factors", "values", "sizes", "read", "write", "laws", "constants", "gates", "latents"}
SCALARS = {"hidden_stride", "residual_stride", "group", "first_point", "points", "streams",
           "n_points", "n_groups", "batch_tokens", "width"}
SHAPES = ((80, 4096, "bf16", True, True), (90, 16384, "fp16", False, True),
          (90, 4096, "bf16", True, False), (100, 4096, "bf16", True, True))
for architecture, width, dtype, split, ranking in SHAPES:
    block, warps, tile = launch_shape(width)
    constants = {"SPLIT": split, "RANKING": ranking, "TILE": tile, "BLOCK": block}
    signature = {
        name: "constexpr" if name in constants else "i32" if name in SCALARS
        else "*fp32" if name in FLOATS else "*" + dtype if name in ("hidden", "residual")
        else "*i64" if name == "encoders" else "*i32"
        for name in edit_tokens.arg_names
    }
    source = ASTSource(fn=edit_tokens, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    assert compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
    print(architecture)
"""


# What comes back


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
    first = torch.randn(1, WIDTH, generator=_generator)
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


# Tables


def edits(count: int, name: str, *, gate: Any = None) -> SteeringPlan:
    """A plan of `count` rank-1 edits."""
    rows = torch.randn(count, WIDTH, generator=_generator)
    block = Block(read=rows, write=rows, laws=torch.zeros(count, LAW_FIELDS))
    made = plan_of(KINDS["ablate"])
    return replace(made, fingerprint=name, rules=(Rule(EVERYWHERE, gate, {HookPoint(0): block}),))


def small_tables(**sizes: int) -> StaticTables:
    groups = [points_of(tap, LAYERS) for tap in TAPS]
    return StaticTables(MODEL, groups, **{"slots": 3, "edit_rows": 10, **sizes})


def addresses(tables: StaticTables) -> list[int]:
    bank = tables.bank(0)
    own = (tables.work, tables.group_work, tables.blocks, tables.gate_rows)
    rows = (bank.read, bank.write, bank.laws, bank.following, bank.constants, bank.gates)
    return [tensor.data_ptr() for tensor in (*own, *rows)]


def test_plans_share_slots_and_idle_ones_make_room() -> None:
    tables = small_tables()
    before = addresses(tables)
    a, b, c = edits(4, "a"), edits(4, "b"), edits(5, "c")
    assert tables.acquire(a) == tables.acquire(a) != tables.acquire(b)
    assert tables.in_use == 2
    assert not tables.can_acquire(c)  # 2 rows are free
    with pytest.raises(CapacityError) as caught:
        tables.acquire(c)
    assert caught.value.code == "rows_full"
    tables.release(a)
    assert not tables.can_acquire(c)  # one reference is left
    tables.release(a)
    assert tables.can_acquire(c)
    assert tables.can_acquire(a)
    tables.acquire(c)  # takes the rows of a
    bank = tables.bank(0)
    assert bank.free.edits == 1
    assert tables.in_use == 2
    assert addresses(tables) == before


def test_the_least_recently_used_plan_goes_first() -> None:
    tables = small_tables()
    plans = [edits(1, name) for name in "abc"]
    slots = [tables.acquire(plan) for plan in plans]
    with pytest.raises(CapacityError) as caught:
        tables.acquire(edits(1, "d"))
    assert caught.value.code == "slots_full"
    for plan in plans:
        tables.release(plan)
    assert tables.acquire(plans[0]) == slots[0]  # used again
    assert tables.acquire(edits(1, "d")) == slots[1]
    assert tables.acquire(plans[2]) == slots[2]


def test_a_plan_that_could_never_fit_is_refused_by_name() -> None:
    tables = small_tables()
    with pytest.raises(TooLarge) as large:
        tables.check(edits(11, "e"))
    assert large.value.code == "too_many_edit_rows"
    elsewhere = replace(
        edits(1, "f"), rules=(Rule(EVERYWHERE, None, {HookPoint(0, "mlp_act"): Block()}),)
    )
    with pytest.raises(Unsupported, match=r"0\.mlp_act"):
        tables.check(elsewhere)
    assert tables.bank(0).free == (10, 10)


def test_plans_within_the_budget_always_find_rows() -> None:
    """Whatever their mixture of edits, constants and gates, and whoever was there before."""
    draw = random.Random(8)
    tables = small_tables(slots=64, edit_rows=40)
    running: list[SteeringPlan] = []
    for number in range(150):
        plan = replace(random_plan(draw), fingerprint=str(number))
        if rows_needed(plan) > 40:
            continue
        while sum(map(rows_needed, [*running, plan])) > 40:
            tables.release(running.pop(draw.randrange(len(running))))
        tables.acquire(plan)
        running.append(plan)
    assert tables.in_use == len(running) > 1
