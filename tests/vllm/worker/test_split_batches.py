"""No model runner of vLLM's steers a batch that vLLM takes apart within a pass.

The configurations are vLLM's own: a name that it drops must not pass unseen.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CacheConfig, ParallelConfig

from steer.engines.vllm.worker.runner_v1 import RunnerV1
from steer.engines.vllm.worker.runner_v2 import RunnerV2
from steer.errors import Unsupported


def runner(parallel: ParallelConfig, cache: CacheConfig) -> Any:
    """What both adapters read of a runner before they refuse it."""

    def prepare_inputs(input_batch: Any, req_states: Any) -> None:
        """As of a `ModelState` of runner V2."""

    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            parallel_config=parallel, cache_config=cache, speculative_config=None
        ),
        speculative_config=None,
        model_state=SimpleNamespace(prepare_inputs=prepare_inputs),
    )


SPLITS: dict[str, tuple[ParallelConfig, CacheConfig]] = {
    "enable_dbo": (ParallelConfig(enable_dbo=True), CacheConfig()),
    "ubatch_size": (ParallelConfig(ubatch_size=3), CacheConfig()),
    "kv_sharing_fast_prefill": (ParallelConfig(), CacheConfig(kv_sharing_fast_prefill=True)),
}


@pytest.mark.parametrize("adapter", [RunnerV1, RunnerV2])
@pytest.mark.parametrize("name", SPLITS)
def test_split_batches_are_refused_by_name(adapter: Any, name: str) -> None:
    with pytest.raises(Unsupported, match=rf"{name}.*start vLLM without it") as refused:
        adapter(runner(*SPLITS[name]), None)
    assert refused.value.code == "split_batch"


@pytest.mark.parametrize("adapter", [RunnerV1, RunnerV2])
def test_prefill_context_parallelism_is_refused(adapter: Any) -> None:
    """vLLM itself refuses to make such a configuration without the devices for it."""
    parallel = ParallelConfig()
    assert parallel.prefill_context_parallel_size == 1
    parallel.prefill_context_parallel_size = 2
    with pytest.raises(Unsupported, match="prefill_context_parallel_size"):
        adapter(runner(parallel, CacheConfig()), None)
