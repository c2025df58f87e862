"""The same with torch.compile: attention is an operator of the graph, and its own Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine
from vllm_inspection import *  # noqa: F403

from steer.engines.vllm.front.engine import VllmEngine


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    options = {"enforce_eager": False, "max_num_seqs": 8, **vllm_engine.ALL_SITES}
    with vllm_engine.start_engine(registry, **options) as running:
        yield running
