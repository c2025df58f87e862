"""What the benchmarks ask for: every kind, each spec another one."""

from __future__ import annotations

import pytest

from benchmarks.vllm import decoding, serving
from benchmarks.vllm.diets import DIETS, Diet, all_kinds, of_kinds
from benchmarks.vllm.shapes import CAPABILITIES, Shape, library
from steer.plan.cache import PlanCache
from steer.spec import KINDS, parse_spec

SMALL = Shape("small", d_model=16, layers=4, heads=2, ffn=32, vocabulary=64)
PLANS = PlanCache(library(SMALL), SMALL.info(), CAPABILITIES)


def test_all_kinds_are_all_kinds() -> None:
    parsed = [parse_spec(spec) for spec in of_kinds(SMALL, 0).values()]
    kinds = {item.kind for spec in parsed for item in spec.interventions}
    assert kinds == set(KINDS) - {"concept"}
    assert {spec.when.scope for spec in parsed if spec.when is not None} == {"prompt", "token"}
    assert any(spec.norm == "preserve" for spec in parsed)


@pytest.mark.parametrize("load", serving.LOADS, ids=lambda one: one.name)
def test_no_two_chats_of_a_load_ask_for_the_same(load: serving.Load) -> None:
    specs = [one for one in load.specs(SMALL, 64) if one is not None]
    assert len(specs) in (0, 64)
    assert len({PLANS.plan(parse_spec(one)).fingerprint for one in specs}) == len(specs)


@pytest.mark.parametrize("diet", DIETS, ids=lambda one: one.name)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_every_diet_can_be_planned(diet: Diet, batch: int) -> None:
    specs = diet.batch(SMALL, batch)
    assert len(specs) == batch
    for spec in specs:
        assert spec is None or PLANS.plan(parse_spec(spec)).rules


def test_the_mixed_batch_has_every_kind_and_requests_without_any() -> None:
    mixed = next(one for one in DIETS if one.name == "all kinds mixed").batch(SMALL, 64)
    assert None in mixed
    kinds = {item["kind"] for one in mixed if one is not None for item in one["interventions"]}
    assert kinds == set(KINDS) - {"concept"}
    assert len(all_kinds(SMALL, 64)) == 64


def test_a_table_has_one_row_for_each_case_over_all_starts() -> None:
    def start(ratio: float) -> decoding.Start:
        one = {"plain": 0.01, "other": 0.01 * ratio, "ratio": ratio, "start_ratio": 1.0}
        return [
            {"diet": name, "batch": 8, "rounds": [one, one]}
            for name in ("nothing steered", "all kinds mixed")
        ]

    found = decoding.table("Decoding", "compiled", decoding.ALL, [start(1.0), start(1.001)])
    (batch, diet, plain, other, speed, extra, each, aim, said), second = found.rows
    assert (batch, diet, plain, other) == ("8", "nothing steered", "10.00", "10.01")
    assert (speed, aim, said) == ("800", "≤ +0.5 %", "met")
    assert extra.startswith("+0.05 % [")
    assert each == "+0.0 +0.1"
    assert second[1] == "all kinds mixed"


def test_a_load_is_held_against_the_plain_server_round_by_round() -> None:
    start = [{"load": "nothing steered", "plain": [100.0, 50.0], "steer": [99.0, 49.5]}]
    found = serving.table("Chats", SMALL, [start, start])
    ((load, _, _, times, each, aim, said),) = found.rows
    assert (load, times, each) == ("nothing steered", "0.99 × [0.99, 0.99]", "-1.0 -1.0")
    assert (aim, said) == ("≥ 0.99 ×", "met")
