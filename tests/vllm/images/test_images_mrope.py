"""The same of models with three positions for each token (M-RoPE), of which an image takes fewer
than it has tokens; Qwen3-VL adds features of images to the stream between layers as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torchvision_beside  # noqa: F401
from seeing_oracle import SeeingOracle
from vllm_images import *  # noqa: F403
from vllm_images import (
    IN_EVERY_FORM,
    PROMPTS,
    STILL,
    assert_told_apart,
    running_llm,
    said,
    use_registry,
)

from steer.engines.vllm.front.offline import Steered


class Running(NamedTuple):
    family: str
    options: dict[str, Any]


COMPILED = {"distributed_executor_backend": "mp", "enforce_eager": False}
ENGINES = {
    "qwen2.5-vl": Running("qwen2.5-vl", {}),
    "qwen3-vl": Running("qwen3-vl", {}),
    "glm-4v": Running("glm-4v", {}),
    "qwen3-vl compiled": Running("qwen3-vl", COMPILED),
}


@pytest.fixture(scope="module", params=ENGINES)
def running(request: pytest.FixtureRequest) -> Running:
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def family(running: Running) -> str:
    return running.family


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all engines: a process keeps the first one's."""
    location = tmp_path_factory.mktemp("registry")
    use_registry(location)
    return location


@pytest.fixture(scope="module")
def llm(running: Running, oracle: SeeingOracle, folder: Path, registry: Path) -> Iterator[Any]:
    with running_llm(folder, limit_mm_per_prompt=STILL, **running.options) as engine:
        yield engine


@pytest.mark.parametrize("name", IN_EVERY_FORM)
def test_the_cache_tells_images_and_specs_apart(
    steered: Steered, oracle: SeeingOracle, name: str
) -> None:
    assert_told_apart(steered, oracle, name)


def test_what_is_compared_hangs_on_positions_and_features(
    oracle: SeeingOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a family's own ways with images are ten times as far from none as answers may be."""
    asked = PROMPTS[0]
    usual = said(oracle, asked, None)
    with monkeypatch.context() as patched:
        patched.setattr(oracle.model.model, "compute_3d_position_ids", lambda **_: None)
        assert _distance(usual.logprobs, said(oracle, asked, None).logprobs) > 1e-3
    decoder = oracle.model.get_decoder()
    if hasattr(decoder, "_deepstack_process"):
        with monkeypatch.context() as patched:
            patched.setattr(decoder, "_deepstack_process", lambda states, *_: states)
            assert _distance(usual.logprobs, said(oracle, asked, None).logprobs) > 1e-3


def _distance(some: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(some, others, strict=True))
