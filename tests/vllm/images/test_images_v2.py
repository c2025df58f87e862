"""The same on model runner V2, in the form for CUDA graphs, its kernels interpreted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import v2_on_cpu
import vllm_engine

v2_on_cpu.enable()

from seeing_oracle import SeeingOracle  # noqa: E402
from vllm_images import *  # noqa: E402, F403
from vllm_images import BLOCK, CHUNK, PROMPTS, SPECS, ask, assert_said, said  # noqa: E402

from steer.engines.vllm.front.offline import Steered  # noqa: E402
from steer.engines.vllm.worker.runner_v2 import RunnerV2  # noqa: E402
from steer.registry.registry import Registry  # noqa: E402


@pytest.fixture(scope="module")
def llm(oracle: SeeingOracle, folder: Path) -> Iterator[Any]:
    registry = folder / "registry"
    with Registry.open(registry) as opened:
        demo_specs.register(opened)
    os.environ["STEER_REGISTRY"] = str(registry)
    from vllm import LLM

    options = {"model": str(folder), "max_num_batched_tokens": CHUNK, "block_size": BLOCK}
    static = {"additional_config": {"steer": {"form": "static"}}}
    running = LLM(**vllm_engine.OPTIONS | options | static, limit_mm_per_prompt={"image": 2})
    worker = running.llm_engine.model_executor.driver_worker.worker
    assert type(worker._runner) is RunnerV2
    yield running
    running.llm_engine.engine_core.shutdown()


def test_the_cache_tells_specs_on_text_and_on_images_apart(
    steered: Steered, oracle: SeeingOracle
) -> None:
    """Each asked twice: the second time what was computed comes from the cache, and counts."""
    for name in ("text", "images", "text", "images"):
        (answer,) = ask(steered, oracle.family, PROMPTS[1:2], [SPECS[name]])
        assert_said(answer, said(oracle, PROMPTS[1], SPECS[name]))
    assert answer.receipt is not None
    assert answer.receipt.tokens_cached > 0
