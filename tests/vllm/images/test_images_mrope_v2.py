"""Three positions for each token and features between layers on model runner V2, in the form for
CUDA graphs, its kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import torchvision_beside  # noqa: F401
import v2_on_cpu

v2_on_cpu.enable()

from seeing_oracle import SeeingOracle  # noqa: E402
from vllm_images import (  # noqa: E402
    PROMPTS,
    SPECS,
    STILL,
    ask,
    assert_said,
    running_llm,
    said,
    use_registry,
)

from steer.engines.vllm.front.offline import Steered  # noqa: E402
from steer.engines.vllm.worker.runner_v2 import RunnerV2  # noqa: E402


@pytest.fixture(scope="module")
def family() -> str:
    return "qwen3-vl"


@pytest.fixture(scope="module")
def llm(oracle: SeeingOracle, folder: Path) -> Iterator[Any]:
    use_registry(folder / "registry")
    static = {"steer": {"form": "static"}}
    with running_llm(folder, limit_mm_per_prompt=STILL, additional_config=static) as running:
        worker = running.llm_engine.model_executor.driver_worker.worker
        assert type(worker._runner) is RunnerV2
        yield running


def test_prompts_in_pieces_are_steered_as_by_hooks(llm: Any, oracle: SeeingOracle) -> None:
    asked = [one for one in PROMPTS[:2] for _ in range(3)]
    specs = [SPECS[name] for name in ("text", "images", "norm preserved")] * 2
    answers = ask(Steered(llm, library=demo_specs.LIBRARY), oracle.family, asked, specs)
    for one, spec, answer in zip(asked, specs, answers, strict=True):
        assert_said(answer, said(oracle, one, spec))
