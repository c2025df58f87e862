"""Speculation in the form for CUDA graphs: its kernel under Triton's interpreter, on a CPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from pathlib import Path

import demo_specs
import pytest
import vllm_engine
from vllm_contract import assert_same
from vllm_engine import Plans
from vllm_simulation import assert_all_free, simulate, steering
from vllm_speculation import NGRAM, counted_drafts

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine

CLIENTS, WAVES = 60, 2
REQUESTS, BLOCKS, STEP_TOKENS = 16, 14, 64


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(
        registry,
        speculative_config=NGRAM,
        additional_config={"steer": {"form": "static"}},
        num_gpu_blocks_override=BLOCKS,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=REQUESTS,
    ) as running:
        assert steering(running).edits.static
        yield running


def test_mixed_requests_and_their_sizes_are_those_without_drafts(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    requests = demo_specs.requests_for(dict(plans), len(plans), seed=6)
    mine, other = engine.complete(requests), reference.complete(requests)
    for request, a, b in zip(requests, mine, other, strict=True):
        assert_same(a, b, request.id)


def test_every_request_of_a_crowd_equals_itself_alone_without_drafts(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with counted_drafts(engine) as drafts:
        report = simulate(engine, reference, plans, clients=CLIENTS, waves=WAVES, seed=13)
    with capsys.disabled():
        print(f"\n{report}; {drafts.total}")
    assert len(report.outcomes) == CLIENTS
    assert report.counts["ties"] <= 2
    assert len(report.watch.preempted) >= 1
    assert drafts.total.accepted >= 5
    assert drafts.total.drafted - drafts.total.accepted >= 20
    assert_all_free(engine)
