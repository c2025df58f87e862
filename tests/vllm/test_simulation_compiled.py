"""The crowd of `test_simulation` on a compiled engine, where constants are added inside graphs.

The graphs have room for the constants of a few plans only, so that the same plan runs inside them
at one time and in the general operator at another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine
from vllm_engine import Plans
from vllm_simulation import simulate, steering

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine

CLIENTS, WAVES = 240, 3


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(
        registry,
        enforce_eager=False,
        num_gpu_blocks_override=26,
        max_num_batched_tokens=48,
        max_num_seqs=16,
        additional_config={"steer": {"shift_rows": 4}},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: VllmEngine) -> Plans:
    return vllm_engine.plans_with_spans(engine)


def test_every_request_of_a_crowd_equals_itself_alone(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shifts = steering(engine).shifts
    assert shifts is not None, "vLLM did not compile the model"
    found, refused, find = 0, 0, shifts.find

    def find_counted(*args: object) -> int | None:
        nonlocal found, refused
        number = find(*args)
        found, refused = found + (number is not None), refused + (number is None)
        return number

    shifts.find = find_counted
    report = simulate(engine, reference, plans, clients=CLIENTS, waves=WAVES, seed=5)
    with capsys.disabled():
        print(f"\n{report}; {found} lookups found room in the graphs, {refused} did not")
    assert len(report.outcomes) == CLIENTS
    assert report.counts["ties"] <= CLIENTS // 100
    assert len(report.watch.preempted) >= 3
    assert report.counts["steered and cached"] >= 5
    assert min(found, refused) >= 20
