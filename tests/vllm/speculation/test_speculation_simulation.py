"""The crowd of `test_simulation` on an engine that speculates, against each request alone without.

Drafts lie in passes beside pieces of prompts, requests are preempted with drafts that nobody has
looked at yet, and turns build on what was drafted before.
"""

from __future__ import annotations

from collections.abc import Iterator

import demo_specs
import pytest
import vllm_engine
from vllm_simulation import Plans, assert_all_free, simulate
from vllm_speculation import NGRAM, counted_drafts

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry

CLIENTS, WAVES = 240, 4
REQUESTS, BLOCKS, STEP_TOKENS = 16, 18, 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("registry")
    with Registry.open(folder) as registry:
        demo_specs.register(registry)
    with vllm_engine.start_engine(
        folder,
        speculative_config=NGRAM,
        num_gpu_blocks_override=BLOCKS,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=REQUESTS,
        enable_prefix_caching=True,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def reference() -> Iterator[TransformersEngine]:
    with TransformersEngine.load(vllm_engine.DEMO_MODEL, name="steer-demo") as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: VllmEngine) -> Plans:
    cache = PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities)
    spans = demo_specs.span_plans(engine.info, engine.capabilities)
    return demo_specs.compiled(cache) | spans


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
