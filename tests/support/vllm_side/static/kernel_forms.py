"""The kernel's form of edits and the torch form, side by side under Triton's interpreter.

Both are shown the same halves of the stream at every tap of a small model while random requests
come, go, wait and are preempted; states and ledgers must agree after every pass. Imported before
Triton, which is told here to interpret.
"""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import SHUT, PositionLedger
from steer.batch.requests import Ints, Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.passes import StaticPass
from steer.engines.vllm.static.tables import StaticTables
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.taps import SITES, points_of, tap_of
from steer.errors import SteerError
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
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
GENERATOR = torch.Generator().manual_seed(12)
EMBEDDING = torch.randn(VOCABULARY, WIDTH, generator=GENERATOR)
WEIGHTS = torch.randn(len(TAPS), WIDTH, WIDTH, generator=GENERATOR) / WIDTH**0.5
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
        self.carried = self.changed = 0
        """Passes of the kernel that were carried on, and tokens in them that got other slots."""
        self.running_pass: StaticPass | None = None

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
        # Each computes a token, and then perhaps the next of them too.
        single = self.draw.random() < 0.5
        if single:
            chosen = [r for r in chosen if r.computed >= r.prompt_length] or chosen
        spans: tuple[list[Span], list[Span]] = ([], [])
        ids: list[int] = []
        self._settle(chosen)
        for request in chosen:
            left = len(request.tokens) - request.computed
            # A token behind others of its request, whose gate is onward, is no kernel's.
            onward = request.plan is not None and request.plan.onward
            end = request.computed + (1 if onward or single else self.draw.randint(1, left))
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
        while (
            single
            and all(r.prompt_length < r.computed < len(r.tokens) for r in chosen)
            and self.draw.random() < 0.8
        ):
            spans = self._carry_on(chosen, spans)
        for request in chosen:
            if request.computed == len(request.tokens):
                self.running.remove(request)
                self._free_slots(request)
                self.free.append(request.row)

    def _carry_on(
        self, chosen: list[Request], spans: tuple[list[Span], list[Span]]
    ) -> tuple[list[Span], list[Span]]:
        """The same requests compute their next tokens: the form's pass is carried on, and the torch
        form's built anew."""
        ids = [request.tokens[request.computed] for request in chosen]
        before = [span.request.slots(span.positions, span.tokens) for span in spans[1]]
        for span in spans[1]:
            span.positions[0] += 1  # the same numbers as in the other form's spans
        now = tuple(
            [replace(span, tokens=np.array([token])) for span, token in zip(of, ids, strict=True)]
            for of in spans
        )
        after = [span.request.slots(span.positions, span.tokens) for span in now[1]]
        changes = {
            n: new[:, 0]
            for n, (old, new) in enumerate(zip(before, after, strict=True))
            if not np.array_equal(old, new)
        }
        self.carried += 1
        self.changed += len(changes)
        for request in chosen:
            request.computed += 1
        self._compute((now[0], now[1]), ids, changes)
        return now[0], now[1]

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

    def _compute(
        self,
        spans: tuple[list[Span], list[Span]],
        ids: list[int],
        changes: dict[int, Ints] | None = None,
    ) -> None:
        """A pass; with `changes`, that of the form is the one before, carried on."""
        total = len(ids)
        step = build_step(self.tables, self.ledgers[0], spans[0], total)
        reference = ForwardPass(step, total, LAYERS)
        if changes is None:
            self.running_pass = self.form.begin(spans[1], total, no_fault)
        elif self.running_pass is not None:
            self.running_pass.carry_on(changes)
        running = self.running_pass
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
        residual = torch.randn(batch, WIDTH, generator=GENERATOR).to(self.dtype)
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


def random_plan(draw: random.Random, *, triggered: bool = False) -> SteeringPlan:
    """Any kind at any site, gated or not; what no kernel does, or the tables cannot hold, is drawn
    again. Of those that are `triggered` every other token is selected."""
    tables = StaticTables(MODEL, [points_of(tap, LAYERS) for tap in TAPS], slots=1, edit_rows=128)
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=4)
        if triggered:
            raw["where"] = {"tokens": draw.sample(range(VOCABULARY), VOCABULARY // 2)}
        for item in raw["interventions"]:
            if triggered:
                item.pop("where", None)
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
