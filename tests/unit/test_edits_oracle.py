"""Every kind against float64 numpy: alone, and in tables next to other slots."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import (
    CLAMPS,
    COMPETING_CLAMPS,
    EVERYTHING,
    SAE_NAMES,
    artefacts,
    shape_of,
)
from float64_reference import Array, Float64Reference
from hypothesis import example, given
from hypothesis import strategies as st

from steer.artefacts.library import MemoryLibrary
from steer.batch.apply import apply_table
from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Needs, Tables
from steer.edits import apply
from steer.model import HookPoint
from steer.plan.compiler import compile_plan
from steer.plan.plan import SteeringPlan
from steer.plan.sources import Sources
from steer.spec import parse_spec

LAYER = 1
POINT = HookPoint(LAYER)

KINDS: dict[str, dict[str, Any]] = {
    "add": {"kind": "add", "vector": "v0", "strength": 1.7},
    "add by the card": {"kind": "add", "vector": "v0"},
    "add a share of the norm": {"kind": "add", "vector": "v0", "strength": {"norm": -0.3}},
    "ablate": {"kind": "ablate", "vector": "v1"},
    "ablate in view": {"kind": "ablate", "vector": "v1", "strength": 0.4},
    "project set": {"kind": "project", "vector": "v2", "value": 2.5},
    "project at_least": {"kind": "project", "vector": "v2", "value": 0.2, "mode": "at_least"},
    "project at_most": {"kind": "project", "vector": "v2", "value": 0.2, "mode": "at_most"},
    "project to a class mean": {"kind": "project", "vector": "v2", "value": "positive"},
    "swap": {"kind": "swap", "remove": "v3", "add": "v4", "strength": 0.5},
    "low_rank": {"kind": "low_rank", "adapter": "lora"},
    "low_rank of a ReLU": {"kind": "low_rank", "adapter": "rectified", "strength": 0.7},
    "affine": {"kind": "affine", "map": "map", "strength": 0.6},
    "rotate": {"kind": "rotate", "vector": "v4", "toward": "v5", "degrees": 130.0},
    "rotate on one side": {
        "kind": "rotate",
        "vector": "v4",
        "toward": "v5",
        "degrees": 130.0,
        "only": "positive",
    },
    "rotate to an angle": {
        "kind": "rotate",
        "vector": "v4",
        "toward": "v5",
        "degrees": 50.0,
        "mode": "to",
    },
    "rotate to an angle on one side": {
        "kind": "rotate",
        "vector": "v1",
        "toward": "v3",
        "degrees": 0.0,
        "mode": "to",
        "only": "positive",
    },
    "patch": {"kind": "patch", "vector": "v5"},
}
for _mode in ("move", "both", "one_way"):
    KINDS[f"exchange {_mode}"] = {
        "kind": "exchange",
        "vector": "v0",
        "toward": "v5",
        "mode": _mode,
        "strength": 0.8,
    }
for _measure in ("product", "projection", "cosine"):
    KINDS[f"read_write {_measure}"] = {
        "kind": "read_write",
        "read": "v1",
        "write": "v4",
        "measure": _measure,
        "bias": 0.1,
        "strength": 1.3,
    }
KINDS["read_write in the state's norm"] = {
    **KINDS["read_write cosine"],
    "threshold": 0.25,
    "strength": {"norm": -0.8},
}
KINDS["read_write without a threshold"] = {
    **KINDS["read_write product"],
    "activation": "linear",
}
KINDS |= CLAMPS | COMPETING_CLAMPS
for _architecture in ("topk", "abstopk", "matching_pursuit-rescaled"):
    KINDS[f"clamp with a k of its own {_architecture}"] = {
        **(CLAMPS | COMPETING_CLAMPS)[f"clamp set {_architecture}"],
        "k": 3,
    }
for _architecture in SAE_NAMES:
    KINDS[f"concept {_architecture}"] = {
        "kind": "concept",
        "sae": _architecture,
        "text": "rain in the city",
        "contrast": "sun",
        "strength": 0.8,
    }

kinds = pytest.mark.parametrize("kind", KINDS)


def encode_text(text: str, point: HookPoint, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(text))
    return torch.randn(len(text.split()), width, generator=generator)


def compiled(spec: dict[str, Any], width: int = 16) -> tuple[SteeringPlan, Float64Reference]:
    made = artefacts(width)

    def encode(text: str, point: HookPoint) -> torch.Tensor:
        return encode_text(text, point, width)

    sources = Sources(MemoryLibrary(**made), shape_of(width), encode)
    plan = compile_plan(parse_spec(spec), sources, EVERYTHING)
    return plan, Float64Reference(**made, encode_text=encode)


def spec_of(name: str, **rest: Any) -> dict[str, Any]:
    item = dict(KINDS[name])
    if item["kind"] not in ("clamp", "concept"):
        item["layers"] = [LAYER]
    return {"interventions": [item], **rest}


def rows(seed: int, count: int, width: int, scale: float = 1.0) -> torch.Tensor:
    # Other seeds than the vectors': a row along a vector leaves nothing to compare once ablated.
    generator = torch.Generator().manual_seed(100_000 + seed)
    return scale * torch.randn(count, width, generator=generator)


def expected(
    reference: Float64Reference, spec: dict[str, Any], x: torch.Tensor, point: HookPoint = POINT
) -> Array:
    parsed = parse_spec(spec)
    return np.stack([reference.steer(parsed, point, row, 0, 1, 0) for row in x.double().numpy()])


def assert_close(actual: torch.Tensor, wanted: Array, tolerance: float = 1e-5) -> None:
    size = 1.0 + np.abs(wanted).max()
    assert np.abs(actual.double().numpy() - wanted).max() <= tolerance * size


@kinds
@pytest.mark.parametrize("norm", [None, "preserve"])
def test_a_kind_equals_float64(kind: str, norm: str | None) -> None:
    spec = spec_of(kind, **({"norm": norm} if norm else {}))
    plan, reference = compiled(spec)
    x = rows(1, 40, 16)

    (only,) = plan.rules
    actual = apply(only.blocks[POINT], x)

    assert_close(actual, expected(reference, spec, x))
    assert not torch.equal(actual, x)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    width=st.sampled_from([4, 8, 20, 64]),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    preserve=st.booleans(),
)
def test_any_shape_and_scale(
    kind: str, width: int, tokens: int, seed: int, scale: float, preserve: bool
) -> None:
    spec = spec_of(kind, **({"norm": "preserve"} if preserve else {}))
    plan, reference = compiled(spec, width)
    x = rows(seed, tokens, width, scale)
    assert_close(apply(plan.rules[0].blocks[POINT], x), expected(reference, spec, x))


def test_leading_dimensions_are_kept() -> None:
    plan, _ = compiled(spec_of("clamp set topk"))
    x = rows(2, 12, 16)
    block = plan.rules[0].blocks[POINT]
    assert torch.equal(apply(block, x.reshape(3, 4, 16)), apply(block, x).reshape(3, 4, 16))


@pytest.mark.parametrize("seed", range(5))
def test_slots_side_by_side_equal_float64(seed: int) -> None:
    """All kinds in one table, tokens of all slots and of none shuffled together."""
    draw = random.Random(seed)
    tables = Tables(shape_of(), slots=2 * len(KINDS))
    specs: dict[int, dict[str, Any]] = {}
    reference = Float64Reference()
    for name in draw.sample(sorted(KINDS), len(KINDS)):
        spec = spec_of(name, **draw.choice([{}, {"norm": "preserve"}]))
        plan, reference = compiled(spec)
        specs[tables.acquire(plan)] = spec
    x = rows(seed, 150, 16)
    slots = torch.tensor([draw.choice([0, *specs]) for _ in range(150)])
    table = tables.at(POINT)[0]
    assert table is not None

    view = table.view(specs)
    actual = apply_table(view, x, slots)

    assert torch.equal(apply_table(replace(view, needs=Needs()), x, slots), actual)
    for slot, spec in specs.items():
        mine = slots == slot
        if mine.any():
            assert_close(actual[mine], expected(reference, spec, x[mine]))
    assert torch.equal(actual[slots == 0], x[slots == 0])


def test_the_fast_form_for_constants_equals_the_general_one() -> None:
    tables = Tables(shape_of(), slots=3)
    slots = [tables.acquire(compiled(spec_of(name))[0]) for name in ("add", "add by the card")]
    table = tables.at(POINT)[0]
    assert table is not None
    assert not any(table.needs(slots))
    tables.acquire(compiled(spec_of("ablate"))[0])
    chosen = torch.tensor([0, *slots] * 10)
    x = rows(9, 30, 16)
    general = apply_table(table.view(table.blocks), x, chosen)
    assert torch.equal(apply_table(table.view(slots), x, chosen), general)


def test_a_part_leaves_out_what_other_slots_hold() -> None:
    """Neither the edits nor the competitions of idle slots are computed, and nothing changes."""
    tables = Tables(shape_of(), slots=len(KINDS))
    held = {name: tables.acquire(compiled(spec_of(name))[0]) for name in KINDS}
    table = tables.at(POINT)[0]
    assert table is not None
    whole = table.view(table.blocks)
    assert whole.encoders
    x = rows(10, 20, 16)
    for slot in held.values():
        if slot in table.blocks:
            view, slots = table.view([slot]), torch.full((20,), slot)
            block = table.blocks[slot]
            assert bool(view.encoders) == (block.encoder is not None)
            assert len(view.read) == block.n_edits
            assert_close(apply_table(view, x, slots), apply_table(whole, x, slots).double().numpy())


@pytest.mark.parametrize("seed", range(5))
def test_edits_of_one_token_each_equal_float64(seed: int) -> None:
    """A batch in which every slot is that of one token: its edits meet no other token."""
    draw = random.Random(seed)
    tables = Tables(shape_of(), slots=len(KINDS))
    x = rows(seed, len(KINDS) + 2, 16)
    slots = [0] * len(x)
    specs, reference = {}, Float64Reference()
    for place, name in zip(draw.sample(range(len(x)), len(KINDS)), KINDS, strict=True):
        specs[place] = spec_of(name, **draw.choice([{}, {"norm": "preserve"}]))
        plan, reference = compiled(specs[place])
        slots[place] = tables.acquire(plan)
    table = tables.at(POINT)[0]
    assert table is not None
    view = table.view(table.blocks)
    owners = torch.tensor([slots.index(max(owner, 0)) for owner in view.owner.tolist()])
    after = apply_table(view, x, torch.tensor(slots), owners)
    for place, row in enumerate(after):
        if place in specs:
            assert_close(row[None], expected(reference, specs[place], x[place, None]))
        else:
            assert torch.equal(row, x[place])
    step = build_step(tables, Ledger(1), solitary(slots, specs), len(x))
    assert step is not None
    assert_close(step.edit(POINT, x), after.double().numpy())


@given(
    shares=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=4, max_size=4),
    seed=st.integers(0, 100),
)
@example(shares=[1, 9], kinds=["ablate in view", "clamp set topk"] * 2, seed=0)
def test_plans_of_any_share_of_a_batch_equal_float64(
    shares: list[int], kinds: list[str], seed: int
) -> None:
    """What a batch works on at one hook point says nothing of the next: there others are edited."""
    draw = random.Random(seed)
    tables, ledger = Tables(shape_of(), slots=len(shares)), Ledger(1)
    specs, slots, reference = [], [], Float64Reference()
    for number, kind in zip(range(len(shares)), kinds, strict=False):
        items = [spec_of(kind)["interventions"][0]]
        if number % 2:
            items.append({"kind": "ablate", "vector": f"v{number}", "layers": [0, 2, 3]})
        specs.append({"interventions": items})
        plan, reference = compiled(specs[-1])
        slots.append(tables.acquire(plan))
    owners = [number for number, share in enumerate(shares) for _ in range(share)]
    draw.shuffle(owners)
    places = {place: specs[owner] for place, owner in enumerate(owners)}
    spans = solitary([slots[owner] for owner in owners], places)
    step = build_step(tables, ledger, spans, len(owners))
    assert step is not None
    for layer in range(4):
        point, x = HookPoint(layer), rows(seed + layer, len(owners), 16)
        after = step.edit(point, x)
        for place, row in enumerate(after):
            wanted = expected(reference, places[place], x[place, None], point)
            assert_close(row[None], wanted)


def solitary(slots: list[int], specs: dict[int, dict[str, Any]]) -> list[Span]:
    """One span of one token for each steered place."""
    one, none = np.array([1], dtype=np.int64), np.array([-1], dtype=np.int64)
    return [
        Span(SteeredRequest(0, 1, compiled(spec)[0], slots[place]), place, one, none)
        for place, spec in specs.items()
    ]


def test_the_slot_idle_for_longest_is_reused_first() -> None:
    tables = Tables(shape_of(), slots=2)
    first, second, third = (compiled(spec_of(kind))[0] for kind in ("ablate", "rotate", "swap"))
    slots = [tables.acquire(plan) for plan in (first, second)]
    for plan in (first, second):
        tables.release(plan)
    assert tables.acquire(third) == slots[0]
    assert tables.acquire(second) == slots[1]
    assert not tables.can_acquire(first)


def test_a_part_is_made_anew_when_its_stage_changes() -> None:
    tables = Tables(shape_of(), slots=2)
    first, second = compiled(spec_of("ablate"))[0], compiled(spec_of("rotate"))[0]
    slot = tables.acquire(first)
    table = tables.at(POINT)[0]
    assert table is not None
    before = table.view([slot])
    assert table.view([slot]) is before
    tables.acquire(second)
    assert table.view([slot]) is not before


def test_the_ablated_direction_is_gone() -> None:
    plan, reference = compiled(spec_of("ablate"))
    x = rows(3, 50, 16, 10.0)
    left = apply(plan.rules[0].blocks[POINT], x).double().numpy() @ reference.unit("v1", LAYER)
    assert np.abs(left).max() <= 1e-5


@pytest.mark.parametrize("degrees", [-75.0, 30.0, 90.0, 180.0, 400.0])
def test_a_rotation_turns_by_its_angle_and_keeps_the_norm(degrees: float) -> None:
    spec = spec_of("rotate")
    spec["interventions"][0]["degrees"] = degrees
    plan, reference = compiled(spec)
    x = rows(4, 50, 16)
    turned = apply(plan.rules[0].blocks[POINT], x).double().numpy()
    before = x.double().numpy()
    a, b = reference.unit("v4", LAYER), reference.unit("v5", LAYER)
    b = b - (a @ b) * a
    b /= np.linalg.norm(b)
    plane_before = before @ a + 1j * (before @ b)
    plane_after = turned @ a + 1j * (turned @ b)
    assert np.allclose(plane_after, plane_before * np.exp(1j * np.radians(degrees)), atol=1e-5)
    assert np.allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(before, axis=1), rtol=1e-5)


@kinds
def test_norm_preserve_keeps_every_norm(kind: str) -> None:
    plan, _ = compiled(spec_of(kind, norm="preserve"))
    x = rows(5, 50, 16, 3.0)
    after = apply(plan.rules[0].blocks[POINT], x)
    assert torch.allclose(after.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_a_row_that_an_edit_cancels_stays_zero_under_norm_preserve() -> None:
    """It has no direction to be rescaled in; 0 · ∞ must not become NaN."""
    from steer.edits import Block

    direction = torch.zeros(16)
    direction[3] = 100.0
    block = Block(shift=-direction, preserve_norm=True)
    assert torch.equal(apply(block, direction[None]), torch.zeros(1, 16))


def test_a_clamp_leaves_the_reconstruction_error_alone() -> None:
    spec = spec_of("clamp set topk")
    plan, reference = compiled(spec)
    sae = reference.saes["topk"]
    x = rows(6, 30, 16)
    after = apply(plan.rules[0].blocks[POINT], x).double().numpy()
    for old, new in zip(x.double().numpy(), after, strict=True):
        features = reference.encode(sae, old)
        error = old - reference.decode(sae, features, old)
        features[[3, 60, 17, 8, 21]] = [0.7, 0.0, 3.0, 1.0, 0.3]
        assert np.allclose(new, reference.decode(sae, features, old) + error, atol=1e-5)


NOTHING: dict[str, dict[str, Any]] = {
    "add": {"kind": "add", "vector": "v0", "strength": 0},
    "add of a norm": {"kind": "add", "vector": "v0", "strength": {"norm": 0.0}},
    "ablate": {"kind": "ablate", "vector": "v0", "strength": -0.0},
    "swap": {"kind": "swap", "remove": "v0", "add": "v1", "strength": 0},
    "exchange": {"kind": "exchange", "vector": "v0", "toward": "v1", "strength": 0},
    "read_write": {"kind": "read_write", "read": "v0", "write": "v1", "strength": 0},
    "read_write of a norm": {
        "kind": "read_write",
        "read": "v0",
        "write": "v1",
        "strength": {"norm": -0.0},
    },
    "low_rank": {"kind": "low_rank", "adapter": "rectified", "strength": 0},
    "affine": {"kind": "affine", "map": "map", "strength": 0},
    "rotate": {"kind": "rotate", "vector": "v0", "toward": "v1", "degrees": 0},
    "clamp": {"kind": "clamp", "sae": "standard", "features": [1, 2], "value": 1, "mode": "scale"},
    "concept": {"kind": "concept", "sae": "standard", "text": "rain", "strength": 0},
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("norm", [None, "preserve"])
def test_zero_strength_compiles_to_nothing(kind: str, norm: str | None) -> None:
    spec = {"interventions": [NOTHING[kind]]} | ({"norm": norm} if norm else {})
    plan, _ = compiled(spec)
    assert plan.rules == ()
    assert plan.points == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [Needs(), Needs(*[False] * len(Needs._fields))])
def test_slot_0_changes_no_bit(dtype: torch.dtype, needs: Needs) -> None:
    tables = Tables(shape_of(), slots=len(KINDS))
    for name in KINDS:
        tables.acquire(compiled(spec_of(name))[0])
    table = tables.at(POINT)[0]
    assert table is not None
    x = rows(7, 64, 16).to(dtype)
    x[::3, ::2] = -0.0
    x[1, 1] = float("inf")
    slots = torch.zeros(64, dtype=torch.long)
    after = apply_table(replace(table.view(table.blocks), needs=needs), x, slots)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert after.dtype == dtype
    assert torch.equal(after.view(bits), x.view(bits))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """The arithmetic is float32; only the result is cast."""
    plan, _ = compiled(spec_of(kind))
    block = plan.rules[0].blocks[POINT]
    x = rows(8, 30, 16).to(dtype)
    assert torch.equal(apply(block, x), apply(block, x.float()).to(dtype))
