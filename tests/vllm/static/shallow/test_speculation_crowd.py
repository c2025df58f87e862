"""The crowd of `test_crowd` on an engine that speculates, against each request alone without.

So shallow a model says the same again and again: most drafts stay, and some do not.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from shallow_model import BRIEF, CLIENTS, WAVES, crowded_engine
from vllm_engine import Plans
from vllm_simulation import graphless_steps, outgrow, simulate
from vllm_speculation import NGRAM, counted_drafts

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine

BLOCKS = 10
HABITS = replace(BRIEF, longest_start=12, longest_answer=6)


@pytest.fixture(scope="module")
def engine(model: Path, registry: Path) -> Iterator[VllmEngine]:
    with crowded_engine(
        registry, model, blocks=BLOCKS, step_tokens=64, speculative_config=NGRAM
    ) as running:
        yield running


def test_every_request_of_a_crowd_equals_itself_alone_without_drafts(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with counted_drafts(engine) as drafts, graphless_steps(engine) as steps:
        report = simulate(
            engine, reference, plans, clients=CLIENTS, waves=WAVES, seed=19, habits=HABITS
        )
    with capsys.disabled():
        print(f"\n{report}; {sum(steps)} of {len(steps)} steps without their graph; {drafts.total}")
    counts, total = report.counts, drafts.total
    assert len(report.outcomes) == CLIENTS
    assert counts["ties"] <= CLIENTS // 100
    assert counts["left"] >= CLIENTS // 50
    assert counts["read"] >= CLIENTS // 35
    # How often so small a crowd is preempted depends on who comes first: see the next test.
    assert total.accepted >= CLIENTS // 5
    assert total.drafted - total.accepted >= CLIENTS // 25
    assert CLIENTS // 25 < sum(steps) < len(steps) - CLIENTS // 25


def test_requests_that_outgrow_the_cache_together_are_preempted(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    watch = outgrow(engine, reference, plans, count=BLOCKS - 1)
    assert len(watch.preempted) >= 3
