"""The same on model runner V2, in the form for CUDA graphs, its kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import v2_on_cpu

v2_on_cpu.enable()

from seeing_oracle import SeeingOracle  # noqa: E402
from vllm_images import *  # noqa: E402, F403
from vllm_images import (  # noqa: E402
    PROMPTS,
    SPECS,
    ask,
    assert_said,
    running_llm,
    said,
    use_registry,
)

from steer.engines.vllm.front.offline import Steered  # noqa: E402
from steer.engines.vllm.worker.runner_v2 import RunnerV2  # noqa: E402


@pytest.fixture(scope="module")
def llm(oracle: SeeingOracle, folder: Path) -> Iterator[Any]:
    use_registry(folder / "registry")
    with running_llm(folder, additional_config={"steer": {"form": "static"}}) as running:
        worker = running.llm_engine.model_executor.driver_worker.worker
        assert type(worker._runner) is RunnerV2
        yield running


def test_the_cache_tells_specs_on_text_and_on_images_apart(
    steered: Steered, oracle: SeeingOracle
) -> None:
    """Each asked twice: the second time what was computed comes from the cache, and counts."""
    for name in ("text", "images", "text", "images"):
        (answer,) = ask(steered, oracle.family, PROMPTS[1:2], [SPECS[name]])
        assert_said(answer, said(oracle, PROMPTS[1], SPECS[name]))
    assert answer.receipt is not None
    assert answer.receipt.tokens_cached > 0
