"""The shallow model, what is registered for it, and its reference. As in `tests/vllm/conftest.py`,
nothing is imported here that imports torch or vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_engine import Plans

    from steer.engines.base import Engine
    from steer.engines.transformers.engine import TransformersEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shallow_model

    return shallow_model.write_shallow_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shallow_model

    folder = tmp_path_factory.mktemp("registry")
    shallow_model.fill_registry(folder)
    return folder


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[TransformersEngine]:
    from steer.engines.transformers.engine import TransformersEngine

    with TransformersEngine.load(model, name="steer-demo") as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: Engine) -> Plans:
    import shallow_model

    return shallow_model.random_plans(engine, 40, seed=8)
