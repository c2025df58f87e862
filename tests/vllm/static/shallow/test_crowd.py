"""The crowd of `test_simulation` in the form for CUDA graphs, its kernel under an interpreter.

Requests of every kind share steps with clamps of a TopK SAE, which have room inside a graph for a
few tokens alone, and with clients who read states, whose steps leave their graph. The model is two
layers deep and the crowd is brief, because the interpreter is slow.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from pathlib import Path

import pytest
from shallow_model import BRIEF, CLIENTS, WAVES, crowded_engine
from vllm_engine import Plans
from vllm_simulation import ask_twice, graphless_steps, outgrow, simulate

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine

BLOCKS = 10


@pytest.fixture(scope="module")
def engine(model: Path, registry: Path) -> Iterator[VllmEngine]:
    with crowded_engine(registry, model, blocks=BLOCKS, step_tokens=48) as running:
        yield running


def test_every_request_of_a_crowd_equals_itself_alone(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with graphless_steps(engine) as steps:
        report = simulate(
            engine, reference, plans, clients=CLIENTS, waves=WAVES, seed=17, habits=BRIEF
        )
    with capsys.disabled():
        print(f"\n{report}; {sum(steps)} of {len(steps)} steps without their graph")
    counts = report.counts
    assert len(report.outcomes) == CLIENTS
    assert counts["ties"] <= CLIENTS // 100
    assert counts["left"] >= CLIENTS // 50
    assert counts["read"] >= CLIENTS // 35
    # How often so small a crowd is preempted, or finds what another left, depends on who comes
    # first: see the next tests.
    assert CLIENTS // 25 < sum(steps) < len(steps) - CLIENTS // 25


def test_requests_that_outgrow_the_cache_together_are_preempted(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    watch = outgrow(engine, reference, plans, count=BLOCKS - 1)
    assert len(watch.preempted) >= 3


def test_what_was_steered_is_found_again(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    assert ask_twice(engine, reference, plans, count=6) >= 3
