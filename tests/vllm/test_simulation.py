"""A crowd of clients on an engine with too little memory, against each request alone.

The KV cache holds a fraction of what the crowd wants, prompts arrive in pieces of 48 tokens, and
turns build on turns; so requests are preempted, computed twice, and found in the prefix cache.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm_engine
from liveness import LIVENESS_SECONDS
from vllm.config import CacheConfig, ParallelConfig
from vllm_engine import Plans
from vllm_simulation import (
    assert_all_free,
    core,
    forget_cache,
    simulate,
    submissions,
)

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.worker.runner_v1 import RunnerV1
from steer.prompts.roles import RoleRanges

CLIENTS, WAVES = 500, 10
REQUESTS, BLOCKS, STEP_TOKENS = 16, 26, 48


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(
        registry,
        num_gpu_blocks_override=BLOCKS,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=REQUESTS,
        enable_prefix_caching=True,
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
    report = simulate(engine, reference, plans, clients=CLIENTS, waves=WAVES, seed=3)
    with capsys.disabled():
        print(f"\n{report}")
    counts, watch = report.counts, report.watch
    assert len(report.outcomes) == CLIENTS
    assert counts["ties"] <= CLIENTS // 100
    assert counts["left"] >= 20
    assert counts["stop"] >= 5
    assert len(watch.preempted) >= 10
    assert watch.resumed_from_cache >= 5
    assert counts["steered and cached"] >= 20


def test_seeded_samples_equal_those_of_the_request_alone(engine: VllmEngine, plans: Plans) -> None:
    """Short prompts that are never computed in pieces: for those vLLM sets a seeded generator
    back, which no generator of torch's on a CPU can do."""
    names = list(plans)
    for first in range(0, len(names), REQUESTS):
        requests = [
            GenerationRequest(
                f"{n} {name}",
                tuple(range(50 + n, 50 + n + STEP_TOKENS // REQUESTS)),
                SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=n, ignore_eos=True),
                plans[name],
                roles=RoleRanges(3, ((1, 3, "user"),)),
            )
            for n, name in enumerate(names[first : first + REQUESTS], first)
        ]
        together = engine.complete(requests)
        for request, mine in zip(requests, together, strict=True):
            forget_cache(engine)
            alone = engine.complete([request])[0]
            assert mine.tokens == alone.tokens, request.id
            assert vllm_engine.plain(mine.receipt and mine.receipt.as_json()) == vllm_engine.plain(
                alone.receipt and alone.receipt.as_json()
            )
        assert len({one.tokens for one in together}) > len(together) // 2
    assert_all_free(engine)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_request_that_is_left_before_its_first_token_leaves_nothing(
    engine: VllmEngine, plans: Plans, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """While it waits, and with a part of its prompt computed: the engine stands still meanwhile."""
    scheduler, scheduled = core(engine).scheduler, 0
    schedule, left = scheduler.schedule, threading.Event()

    def held(*args: object, **named: object) -> object:
        nonlocal scheduled
        if scheduled == steps:
            left.wait(LIVENESS_SECONDS)
        scheduled += 1
        return schedule(*args, **named)

    monkeypatch.setattr(scheduler, "schedule", held)

    async def leave(come: threading.Semaphore) -> None:
        sampling = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
        request = GenerationRequest("gone", tuple(range(5, 95)), sampling, plans["everything"])
        tasks = [asyncio.ensure_future(anext(engine.generate(request))) for _ in range(8)]
        for _ in tasks:
            assert await asyncio.to_thread(come.acquire, timeout=LIVENESS_SECONDS)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)

    with submissions(engine) as come:
        try:
            asyncio.run(leave(come))
        finally:
            left.set()
    engine.complete([GenerationRequest("after", (5, 6), SamplingParams(max_tokens=2))])
    assert core(engine).scheduler.get_num_unfinished_requests() == 0
    assert_all_free(engine)


def test_a_token_that_the_host_does_not_know_yet_is_read_from_the_models_input() -> None:
    """With asynchronous scheduling, which vLLM does not have on a CPU, the host holds −1 for it,
    and a trigger on that token would be missed."""
    runner = SimpleNamespace(
        _model_forward=lambda input_ids, positions, intermediate_tensors, inputs_embeds: None,
        _determine_batch_execution_and_padding=lambda force_eager: None,
        vllm_config=SimpleNamespace(parallel_config=ParallelConfig(), cache_config=CacheConfig()),
        speculative_config=None,
        use_async_spec_decode=False,
        positions=None,
        input_ids=SimpleNamespace(gpu=torch.tensor([7, 8, 9, 41, 10])),
        input_batch=SimpleNamespace(
            req_ids=["prompt", "in flight", "known"],
            num_computed_tokens_cpu=np.array([0, 3, 1]),
            token_ids_cpu=np.array([[7, 8, 9, 0], [1, 2, 3, -1], [5, 10, 0, 0]]),
        ),
    )
    batch = RunnerV1(runner, None)._batch({"prompt": 3, "in flight": 1, "known": 1})
    assert [list(batch.tokens_of(n, True)) for n in range(3)] == [[7, 8, 9], [41], [10]]
    assert list(batch.tokens) == [7, 8, 9, 41, 10]
