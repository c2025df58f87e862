"""The benchmark of read-outs: what it asks for, what it makes of answers and of times."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.vllm.readouts.arms import NOTHING, PLAIN, Arm, arms
from benchmarks.vllm.readouts.measuring import table
from benchmarks.vllm.shapes import SHAPES
from steer.readouts.spec import ReadoutSpec

ARMS = {one.name: one for one in arms(SHAPES["smollm2"])}
PROJECTIONS, NORM = ARMS["4 projections"], ARMS["norm"]


def answer(arm: Arm, tokens: int, *, entries: int | None = None) -> dict[str, Any]:
    one = {name: [{"value": 0.5}] * count for name, count in arm.entries.items()}
    return {
        "usage": {"completion_tokens": tokens},
        "steering": {"readouts": [one] * (tokens - 1 if entries is None else entries)},
    }


@pytest.mark.parametrize("shape", ["smollm2", "demo"])
def test_what_is_asked_for_is_a_spec(shape: str) -> None:
    found = arms(SHAPES[shape])
    assert [one.name for one in found[:2]] == [PLAIN, NOTHING]
    assert [one.plain for one in found].count(True) == 1
    for one in found:
        assert (one.inspect is None) == (not one.entries)
        if one.inspect is not None:
            ReadoutSpec.model_validate(one.inspect)
            assert one.body([], "m", 4)["inspect"] == one.inspect
        else:
            assert "inspect" not in one.body([], "m", 4)


def test_answers_that_are_not_what_was_asked_for_are_not_timed() -> None:
    PROJECTIONS.check(answer(PROJECTIONS, 5), 5)
    ARMS[NOTHING].check({"usage": {"completion_tokens": 5}}, 5)
    with pytest.raises(RuntimeError, match="5 tokens, not 6"):
        PROJECTIONS.check(answer(PROJECTIONS, 5), 6)
    with pytest.raises(RuntimeError, match="3 entries, not 4"):
        PROJECTIONS.check(answer(PROJECTIONS, 5, entries=3), 5)
    with pytest.raises(RuntimeError, match="4 entries, not 0"):
        ARMS[NOTHING].check(answer(NORM, 5), 5)
    fewer = answer(PROJECTIONS, 2)
    fewer["steering"]["readouts"][0]["projections"].pop()
    with pytest.raises(RuntimeError, match="'projections': 3"):
        PROJECTIONS.check(fewer, 2)


def test_costs_are_ratios_within_a_round() -> None:
    # Each round is twice as slow as the one before it; ratios do not see that.
    costs = {PLAIN: 0.98, "4 projections": 1.01, "top 5 features of resid-14": 1.2}
    rounds = [{name: 2.0**n * costs.get(name, 1.0) for name in ARMS} for n in range(4)]
    rows = {row[0]: row for row in table(SHAPES["smollm2"], rounds, chats=64, tokens=32).rows}
    assert rows["4 projections"][2].startswith("+1.00 %")
    assert rows["4 projections"][-2:] == ("≤ +2 %", "met")
    assert rows["top 5 features of resid-14"][-1] == "not met"
    assert rows[NOTHING][2] == ""
    assert rows[NOTHING][3].startswith("+2.04 %")
    assert rows["norm"][-2:] == ("", "")
