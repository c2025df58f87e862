"""What files of this folder share: a registry, the reference, and every spec as a plan.

A file gives the fixture `engine`. Nothing is imported here that imports torch or vLLM: files set
the environment first that Triton and vLLM read when they are imported.
"""

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
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry that has whatever the specs name."""
    import vllm_engine

    folder = tmp_path_factory.mktemp("registry")
    vllm_engine.fill_registry(folder)
    return folder


@pytest.fixture(scope="module")
def reference() -> Iterator[TransformersEngine]:
    """The demo model in the transformers engine."""
    import vllm_engine

    from steer.engines.transformers.engine import TransformersEngine

    with TransformersEngine.load(vllm_engine.DEMO_MODEL, name="steer-demo") as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: Engine) -> Plans:
    """Every spec at a site that the engine has open."""
    import vllm_engine

    return vllm_engine.plans_for(engine)
