"""The contract, on vLLM with torch.compile: taps inside the graph, in two tiers."""

from __future__ import annotations

from collections.abc import Iterator

import demo_specs
import inner_specs
import pytest
import vllm_engine
from vllm_contract import *  # noqa: F403

from steer.engines.vllm.front.engine import VllmEngine
from steer.registry.registry import Registry


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("registry")
    with Registry.open(folder) as registry:
        demo_specs.register(registry)
        inner_specs.register(registry)
    with vllm_engine.start_engine(folder, enforce_eager=False, **vllm_engine.ALL_SITES) as running:
        yield running
