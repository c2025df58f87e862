"""A worker of vLLM's, without vLLM: what it does to the tokens of requests that decode together.

Triggers look at every token, so that passes are carried on with other slots; each token must get
its own edit and leave its own bits. Ramps give every token another share, windows end: a pass is
built anew for an end, and for nothing else.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, artefacts, shape_of

from steer.artefacts.library import MemoryLibrary
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.engines.vllm.taps.taps import SITES, CompiledTap, EagerTap, tap_of
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.edits import TapEdits
from steer.engines.vllm.worker.prepared import BatchTokens
from steer.engines.vllm.worker.requests import receipt
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

WIDTH, LAYERS, VOCABULARY, PROMPT, STEPS = 16, 4, 6, 3, 40
MODEL = replace(shape_of(WIDTH, LAYERS), sites=SITES)
MADE = artefacts(WIDTH, LAYERS)
PLANS = PlanCache(MemoryLibrary(**MADE), MODEL, EVERYTHING)
POINT = HookPoint(2)
TRIGGERS = ({1}, {2, 3}, {0, 4, 5})


def triggered(tokens: set[int], strength: float, kind: str) -> SteeringPlan:
    amount: object = strength if kind == "constant" else {"norm": strength}
    item = {"kind": "add", "vector": "v0", "strength": amount, "layers": [POINT.layer]}
    where = {"tokens": sorted(tokens), "phases": ["generation"]}
    return PLANS.plan(parse_spec({"interventions": [item], "where": where}))


def _ticket(name: str, plan: SteeringPlan) -> Ticket:
    selections = tuple(one.selection for one in plan.rules)
    return Ticket(name, fingerprint=plan.fingerprint, plan=plan.fingerprint, selections=selections)


def test_a_plan_that_does_nothing_harms_nobody_and_has_its_receipt() -> None:
    """Every strength 0: its tokens are in no table, alone as beside others that are steered."""
    nothing = PLANS.plan(
        parse_spec({"interventions": [{"kind": "add", "vector": "v0", "strength": 0}]})
    )
    assert not nothing.rules
    plans = {"nothing": nothing, "steered": triggered({0}, 1.0, "relative to the norm")}
    for names in (["nothing"], ["nothing", "steered"]):
        steering = WorkerSteering(
            MODEL,
            {plan.fingerprint: plan for plan in plans.values()}.__getitem__,
            TapEdits(MODEL, 4, torch.device("cpu")),
            max_requests=4,
        )
        for name in names:
            steering.admit(name, [0] * PROMPT, _ticket(name, plans[name]))
        for start, count in ((0, PROMPT), (PROMPT, 1)):
            each = np.full(len(names), 1, dtype=np.int64)
            ids = np.zeros(count * len(names), dtype=np.int64)
            steering.begin(
                BatchTokens(names, start * each, count * each, lambda ids=ids: ids)  # type: ignore[misc]
            )
            EagerTap(tap_of(POINT))(*torch.randn(2, count * len(names), WIDTH))
            steering.end()
        for name in names:
            found = receipt(steering.requests.records(name)[0], PROMPT + 1)
            assert found.tokens_steered == (name == "steered")


@pytest.mark.parametrize(
    ("dtype", "hidden", "logit", "lost"),
    [
        (torch.float32, 1.0, 1.0, False),
        (torch.bfloat16, 1.0, 1.0, False),
        (torch.float32, 1e25, 1.0, False),  # its square is beyond float32
        (torch.float32, torch.nan, torch.nan, True),
        (torch.bfloat16, torch.inf, torch.nan, True),
        (torch.float32, 1e25, torch.nan, True),
        (torch.float16, 1e4, torch.inf, True),
    ],
    ids=str,
)
def test_logits_that_are_not_finite_are_noted_of_their_request_alone(
    dtype: torch.dtype, hidden: float, logit: float, lost: bool
) -> None:
    plan = triggered({0}, 1.0, "relative to the norm")
    edits = TapEdits(MODEL, 4, torch.device("cpu"))
    steering = WorkerSteering(MODEL, lambda _: plan, edits, max_requests=4)
    for name in ("this", "other"):
        steering.admit(name, [0] * PROMPT, _ticket(name, plan))
    for start, count in ((0, PROMPT), (PROMPT, 1)):
        each, ids = np.ones(2, dtype=np.int64), np.zeros(2 * count, dtype=np.int64)
        steering.begin(
            BatchTokens(["this", "other"], start * each, count * each, lambda ids=ids: ids)  # type: ignore[misc]
        )
        EagerTap(tap_of(POINT))(*torch.randn(2, count * 2, WIDTH))
        steering.end()
        made = torch.ones(2, WIDTH, dtype=dtype), torch.ones(2, VOCABULARY, dtype=dtype)
        if start:
            made[0][0, 3] = hidden
            made[1][0] = logit
        steering.look(*made)
    ledger = steering.requests.ledger
    rows = [steering.requests.get(name).row for name in ("this", "other")]  # type: ignore[union-attr]
    assert [ledger.runs_over(row, PROMPT + 1) for row in rows] == [lost, False]
    assert not ledger.runs_over(rows[0], PROMPT)


@pytest.mark.parametrize("kind", ["constant", "relative to the norm"])
def test_a_pass_is_carried_on_while_ramps_change(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    amount: object = 1.5 if kind == "constant" else {"norm": 0.5}
    item = {"kind": "add", "vector": "v0", "strength": amount, "layers": [POINT.layer]}
    points = [[0, 1.0], [9, 0.25], [20, 0.0]]
    ramped = np.interp(np.arange(STEPS), *zip(*points, strict=True))
    windows = {
        "fading": ({"ramp": points}, ramped),
        "at first": ({"where": {"every": {"first": 12}}}, np.arange(STEPS) < 12),
        "in the middle": (
            {"where": {"positions": [[PROMPT + 5, PROMPT + 30]]}},
            (np.arange(STEPS) >= 5) & (np.arange(STEPS) < 30),
        ),
    }
    plans = {
        name: PLANS.plan(parse_spec({"interventions": [item], **spec}))
        for name, (spec, _) in windows.items()
    }
    edits, built = TapEdits(MODEL, 4, torch.device("cpu")), []
    begin = edits.begin
    monkeypatch.setattr(edits, "begin", lambda coming: (built.append(coming), begin(coming))[1])
    steering = WorkerSteering(
        MODEL,
        {plan.fingerprint: plan for plan in plans.values()}.__getitem__,
        edits,
        max_requests=4,
    )
    for name, plan in plans.items():
        steering.admit(name, [0] * PROMPT, _ticket(name, plan))
    tap, vector = EagerTap(tap_of(POINT)), MADE["vectors"]["v0"][POINT.layer]
    generator, ids = torch.Generator().manual_seed(0), np.zeros(len(plans), dtype=np.int64)
    each = np.ones(len(plans), dtype=np.int64)
    anew = []
    for step in range(STEPS):
        stream = torch.randn(len(plans), WIDTH, generator=generator)
        count = len(built)
        steering.begin(BatchTokens([*plans], each * (PROMPT + step), each, lambda: ids))
        anew += [step] * (len(built) - count)
        hidden, residual = tap(stream / 2, stream / 2)
        steering.end()
        for n, (_, shares) in enumerate(windows.values()):
            size = 1.5 if kind == "constant" else 0.5 * stream[n].norm() / vector.norm()
            wanted = stream[n] + float(shares[step]) * size * vector
            torch.testing.assert_close(hidden[n] + residual[n], wanted, rtol=1e-5, atol=1e-5)
    assert anew == [0, 5, 12, 20, 30]
    for name, (_, shares) in windows.items():
        found = receipt(steering.requests.records(name)[0], PROMPT + STEPS)
        generated = int((shares > 0).sum())
        assert found.tokens_steered == generated + (PROMPT if name == "fading" else 0)
    assert found.ramps == ()


@pytest.mark.parametrize("kind", ["constant", "relative to the norm"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_gets_what_it_triggers(seed: int, compiled: bool, kind: str) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    plans = {f"r{n}": triggered(tokens, 0.5 + n, kind) for n, tokens in enumerate(TRIGGERS)}
    shifts = None
    if compiled:
        shifts = ShiftTables(
            2 * LAYERS + 1,
            WIDTH,
            variants=16,
            bank_rows=16,
            batch_tokens=16,
            device=torch.device("cpu"),
        )
    steering = WorkerSteering(
        MODEL,
        {plan.fingerprint: plan for plan in plans.values()}.__getitem__,
        TapEdits(MODEL, 4, torch.device("cpu")),
        max_requests=4,
        shifts=shifts,
    )
    index = tap_of(POINT)
    tap = EagerTap(index) if shifts is None else CompiledTap(index, shifts, EagerTap(index))
    order = [*plans, "plain"]
    for req_id in order:
        plan = plans.get(req_id)
        ticket = None if plan is None else _ticket(req_id, plan)
        steering.admit(req_id, [0] * PROMPT, ticket)
    vector = MADE["vectors"]["v0"][POINT.layer]
    expected_bits: dict[str, list[int]] = {req_id: [] for req_id in plans}
    for step in range(STEPS):
        tokens = [draw.randrange(VOCABULARY) for _ in order]
        batch = BatchTokens(
            order,
            np.full(len(order), PROMPT + step, dtype=np.int64),
            np.ones(len(order), dtype=np.int64),
            lambda tokens=tokens: np.array(tokens, dtype=np.int64),  # type: ignore[misc]
        )
        before = torch.randn(2, len(order), WIDTH, generator=generator)
        hidden, residual = before.clone()
        steering.begin(batch)
        hidden, residual = tap(hidden, residual)
        steering.end()
        for n, req_id in enumerate(order):
            stream = before[0, n] + before[1, n]
            wanted = stream
            if req_id in plans:
                fires = tokens[n] in TRIGGERS[n]
                expected_bits[req_id].append(int(fires))
                if fires and kind == "constant":
                    wanted = stream + (0.5 + n) * vector
                elif fires:
                    wanted = stream + (0.5 + n) * stream.norm() * vector / vector.norm()
            torch.testing.assert_close(hidden[n] + residual[n], wanted, rtol=1e-5, atol=1e-5)
    for req_id, bits in expected_bits.items():
        request = steering.requests.get(req_id)
        assert request is not None
        assert request.fault is None
        assert (
            steering.requests.ledger.applied[request.row, PROMPT : PROMPT + STEPS].tolist() == bits
        )
