"""The same on model runner V2, with the form for CUDA graphs, its kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import v2_on_cpu
import vllm_engine

v2_on_cpu.enable()

from vllm_inspection import *  # noqa: E402, F403
from vllm_simulation import core, steering  # noqa: E402

# Prompts of one token for each of the vocabulary, several times: too many for an interpreter. What
# it asks of the workers is compared by the test before it.
del globals()["test_neurons_and_heads_are_the_tokens_of_the_reference"]

from steer.engines.vllm.front.engine import VllmEngine  # noqa: E402
from steer.engines.vllm.worker.runner_v2 import RunnerV2  # noqa: E402


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    own: dict[str, Any] = {"form": "static", "sites": ["head_out", "mlp_act"]}
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with vllm_engine.start_engine(registry, **options, additional_config={"steer": own}) as running:
        worker = core(running).model_executor.driver_worker.worker
        assert type(worker._runner) is RunnerV2
        assert steering(running).edits.static
        yield running
