"""Clamps of transcoders: read at one hook point and written at another, against float64.

Each token has a row where the transcoder reads and one where it writes; the reference runs the
whole transcoder on the first, edits its features, and adds the difference to the second.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import (
    EVERYTHING,
    MODES,
    NORMALISATIONS,
    random_transcoder,
    random_vector,
    shape_of,
)
from float64_reference import Array, Float64Reference, chosen

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.errors import EngineError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import SteeringSpec, parse_spec

WIDTH, TOKENS = 16, 9
READ, WRITTEN = HookPoint(1, "mlp_in"), HookPoint(1, "mlp_out")
ARCHITECTURES = ("standard", "jumprelu", "topk", "groupmax", "abstopk")
NAMES = [one + suffix for suffix in NORMALISATIONS for one in ARCHITECTURES]
SAES = {
    name: random_transcoder(
        name, seed=70 + n, **({} if name in ARCHITECTURES else {"W_skip": None})
    )
    for n, name in enumerate(NAMES)
}
VECTORS = {f"v{n}": random_vector(n, *range(4), width=WIDTH) for n in range(3)}
REFERENCE = Float64Reference(vectors=VECTORS, saes=SAES)
PLANS = PlanCache(MemoryLibrary(vectors=VECTORS, saes=SAES), shape_of(WIDTH), EVERYTHING)


def in_a_norm(name: str, mode: str) -> bool:
    """Whether a clamp would have two lengths: one where it reads and one where it writes."""
    return "share" in mode and mode != "add a share" and name not in ARCHITECTURES


CLAMPS = {
    f"{mode} {name}": {"kind": "clamp", "sae": name, "features": [3, 60, 17, 8, 21], **MODES[mode]}
    for name in NAMES
    for mode in MODES
    if not in_a_norm(name, mode)
}


def one(item: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"interventions": [item], **rest}


SPECS: dict[str, dict[str, Any]] = {
    "one clamp": one(CLAMPS["set jumprelu"]),
    "one that competes": one(CLAMPS["at_least topk"]),
    "groups": one(CLAMPS["set where active groupmax"]),
    "two transcoders": {
        "interventions": [CLAMPS["scale standard"], CLAMPS["set abstopk-rescaled"]]
    },
    "beside a vector where it writes": {
        "interventions": [
            {"kind": "add", "vector": "v0", "layers": [1], "site": "mlp_out", "strength": 2.0},
            CLAMPS["set a share jumprelu"],
        ]
    },
    "behind a vector where it reads": {
        "interventions": [
            CLAMPS["set jumprelu"],
            {"kind": "add", "vector": "v1", "layers": [1], "site": "mlp_in", "strength": 2.0},
        ]
    },
    "some tokens": one(CLAMPS["drop standard"], where={"positions": [[-2, 6]]}),
    "the norm kept": one(CLAMPS["set topk"], norm="preserve"),
    "a vector alone": one(
        {"kind": "ablate", "vector": "v2", "layers": [1], "site": "mlp_out", "strength": 0.5}
    ),
}


def compiled(spec: dict[str, Any]) -> SteeringPlan:
    return PLANS.plan(parse_spec(spec))


def rows(seed: int, count: int = TOKENS) -> torch.Tensor:
    return 2 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def truth(spec: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> Array:
    """What a prompt of 4 tokens and what follows it write, y, where they read x."""
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    return np.stack([_truth(parse_spec(spec), *pair, n) for n, pair in enumerate(pairs)])


def _truth(spec: SteeringSpec, x: Array, y: Array, position: int) -> Array:
    acting = [one for one in spec.interventions if chosen(spec, one, position, 4, 0)]
    read, written = x, y
    for item in acting:
        if READ in REFERENCE.points(item):
            read = REFERENCE.edited(item, read, 1)
    for item in acting:
        if WRITTEN in REFERENCE.points(item):
            clamps = item.kind == "clamp"
            edited = (
                REFERENCE.clamped(item, written, read)
                if clamps
                else (REFERENCE.edited(item, written, 1))
            )
            if spec.norm == "preserve":
                edited = edited * np.linalg.norm(written) / np.linalg.norm(edited)
            written = edited
    return written


def step_of(spans: list[tuple[SteeringPlan, range]], tokens: int) -> tuple[Step, Ledger]:
    tables = Tables(shape_of(WIDTH), slots=8)
    ledger = Ledger(len(spans))
    made, offset = [], 0
    for row, (plan, positions) in enumerate(spans):
        steered = SteeredRequest(row, 4, plan, tables.acquire(plan))
        places = np.array(positions, dtype=np.int64)
        made.append(Span(steered, offset, places, np.zeros(len(places), dtype=np.int64)))
        offset += len(places)
    step = build_step(tables, ledger, made, tokens)
    assert step is not None
    return step, ledger


def run(step: Step, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What a pass makes of y, which a model would make of what it makes of x."""
    step.edit(READ, x)
    found = step.edit(WRITTEN, y)
    step.finish()
    return found


def assert_close(found: torch.Tensor, wanted: Array) -> None:
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLAMPS)
def test_a_clamp_is_that_of_the_whole_transcoder(name: str) -> None:
    """Alone, where all tokens share a slot; and beside others, where they do not."""
    x, y = rows(1), rows(2)
    plan = compiled(one(CLAMPS[name]))
    wanted = truth(one(CLAMPS[name]), x, y)
    alone, _ = step_of([(plan, range(TOKENS))], TOKENS)
    assert_close(run(alone, x, y), wanted)
    beside, _ = step_of([(plan, range(TOKENS)), (compiled(SPECS["one clamp"]), range(3))], 12)
    found = run(beside, torch.cat([x, rows(3, 3)]), torch.cat([y, rows(4, 3)]))
    assert_close(found[:TOKENS], wanted)


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_of_specs_equals_float64_however_it_is_cut(seed: int) -> None:
    """Whole, and in two passes; first with requests of one token each."""
    draw = random.Random(seed)
    specs = [SPECS[name] for name in draw.sample(list(SPECS), 5)]
    lengths = [draw.randint(1, TOKENS) if seed else 1 for _ in specs]
    states = [(rows(100 * seed + n, k), rows(1000 + n, k)) for n, k in enumerate(lengths)]
    wanted = [truth(spec, *state) for spec, state in zip(specs, states, strict=True)]
    middle = [draw.randint(1, length) for length in lengths]
    whole, first = [slice(0, n) for n in lengths], [slice(0, n) for n in middle]
    second = [slice(m, n) for m, n in zip(middle, lengths, strict=True)]
    for cuts in (whole, first, second):
        spans = [
            (compiled(spec), range(cut.start, cut.stop))
            for spec, cut in zip(specs, cuts, strict=True)
        ]
        x, y = (
            torch.cat([state[half][cut] for state, cut in zip(states, cuts, strict=True)])
            for half in (0, 1)
        )
        expected = np.concatenate([one[cut] for one, cut in zip(wanted, cuts, strict=True)])
        if len(x):
            step, _ = step_of(spans, len(x))
            assert_close(run(step, x, y), expected)


def test_where_nothing_changes_no_bit_does() -> None:
    """Features that are at least what they are asked to be, and tokens of nobody."""
    x, y = rows(5), rows(6)
    item = {**CLAMPS["set jumprelu"], "mode": "at_least", "value": 0.0}
    step, _ = step_of([(compiled(one(item)), range(4))], TOKENS)
    found = run(step, x, y)
    assert torch.equal(found, y)
    step, _ = step_of([(compiled(SPECS["one clamp"]), range(4))], TOKENS)
    found = run(step, x, y)
    assert torch.equal(found[4:], y[4:])
    assert not torch.equal(found[:4], y[:4])


def test_tokens_are_counted_where_they_are_written() -> None:
    step, ledger = step_of([(compiled(SPECS["some tokens"]), range(TOKENS))], TOKENS)
    run(step, rows(1), rows(2))
    assert step.points == {READ, WRITTEN}
    assert ledger.tokens[0].tolist()[:2] == [TOKENS - 4, 4]


@pytest.mark.parametrize("scope", ["token", "prompt"])
@pytest.mark.parametrize("gate_site", ["mlp_in", "mlp_out"])
def test_a_gate_may_read_before_or_behind_what_is_read(scope: str, gate_site: str) -> None:
    vector = random_vector(7, 1, width=WIDTH, site=gate_site)
    plans = PlanCache(MemoryLibrary(vectors={"g": vector}, saes=SAES), shape_of(WIDTH), EVERYTHING)
    when = {"vector": "g", "above": 0.0, "layer": 1, "scope": scope}
    plan = plans.plan(parse_spec(one(CLAMPS["set jumprelu"], when=when)))
    x, y = rows(11), rows(12)
    seen = x if gate_site == "mlp_in" else y
    opens = (seen @ vector[1] > 0).numpy()
    if scope == "prompt":
        opens = np.array([False] * 3 + [opens[3]] * (TOKENS - 3))
    step, _ = step_of([(plan, range(TOKENS))], TOKENS)
    clamped = truth(one(CLAMPS["set jumprelu"]), x, y)
    wanted = np.where(opens[:, None], clamped, y.double().numpy())
    assert_close(run(step, x, y), wanted)


def test_a_pass_that_never_reads_is_refused() -> None:
    step, _ = step_of([(compiled(SPECS["one clamp"]), range(TOKENS))], TOKENS)
    with pytest.raises(EngineError, match=r"did not reach 1\.mlp_in before"):
        step.edit(WRITTEN, rows(2))
    # What a pass has read is not there in the next.
    run(step, rows(1), rows(2))
    with pytest.raises(EngineError, match=r"did not reach 1\.mlp_in before"):
        step.edit(WRITTEN, rows(2))
