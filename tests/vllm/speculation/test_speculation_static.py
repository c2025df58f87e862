"""Speculation in the form for CUDA graphs: its kernel under Triton's interpreter, on a CPU.

A crowd with too little memory is in `tests/vllm/static/shallow`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from pathlib import Path

import demo_specs
import pytest
import vllm_engine
from vllm_contract import assert_same
from vllm_engine import Plans
from vllm_simulation import steering
from vllm_speculation import NGRAM

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(
        registry,
        speculative_config=NGRAM,
        additional_config={"steer": {"form": "static"}},
        max_num_batched_tokens=64,
        max_num_seqs=16,
    ) as running:
        assert steering(running).edits.static
        yield running


def test_mixed_requests_and_their_sizes_are_those_without_drafts(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    requests = demo_specs.requests_for(dict(plans), len(plans), seed=6)
    mine, other = engine.complete(requests), reference.complete(requests)
    for request, a, b in zip(requests, mine, other, strict=True):
        assert_same(a, b, request.id)
