"""The crowd of `test_simulation` on an engine that speculates, against each request alone without.

Drafts lie in passes beside pieces of prompts, requests are preempted with drafts that nobody has
looked at yet, and turns build on what was drafted before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine
from vllm_engine import Plans
from vllm_simulation import assert_all_free, simulate
from vllm_speculation import NGRAM, counted_drafts

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine

CLIENTS, WAVES = 320, 4
REQUESTS, BLOCKS, STEP_TOKENS = 16, 18, 64


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(
        registry,
        speculative_config=NGRAM,
        num_gpu_blocks_override=BLOCKS,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=REQUESTS,
        enable_prefix_caching=True,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: VllmEngine) -> Plans:
    return vllm_engine.plans_with_spans(engine)


def test_every_request_of_a_crowd_equals_itself_alone_without_drafts(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with counted_drafts(engine) as drafts:
        report = simulate(engine, reference, plans, clients=CLIENTS, waves=WAVES, seed=11)
    with capsys.disabled():
        print(f"\n{report}; {drafts.total}")
    counts, watch = report.counts, report.watch
    assert len(report.outcomes) == CLIENTS
    assert counts["ties"] <= CLIENTS // 100
    assert counts["left"] >= 10
    assert len(watch.preempted) >= 5
    assert watch.resumed_from_cache >= 2
    assert counts["steered and cached"] >= 10
    assert drafts.total.accepted >= 50
    assert drafts.total.drafted - drafts.total.accepted >= 200
    assert_all_free(engine)
