"""The contract, on vLLM without torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine
from vllm_contract import *  # noqa: F403

from steer.engines.vllm.front.engine import VllmEngine


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(registry, **vllm_engine.ALL_SITES) as running:
        yield running
