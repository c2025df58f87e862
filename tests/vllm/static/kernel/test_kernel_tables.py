"""The kernel's tables: slots and rows are shared, kept while idle, and bounded."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_forms import GENERATOR, KINDS, LAYERS, MODEL, TAPS, WIDTH, plan_of, random_plan

from steer.edits import Block
from steer.engines.vllm.static.rows import rows_needed
from steer.engines.vllm.static.tables import StaticTables
from steer.engines.vllm.taps.taps import points_of
from steer.errors import CapacityError, TooLarge, Unsupported
from steer.laws import LAW_FIELDS
from steer.model import HookPoint
from steer.plan.plan import Rule, SteeringPlan
from steer.plan.selection import EVERYWHERE


def edits(count: int, name: str, *, gate: Any = None) -> SteeringPlan:
    """A plan of `count` rank-1 edits."""
    rows = torch.randn(count, WIDTH, generator=GENERATOR)
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
