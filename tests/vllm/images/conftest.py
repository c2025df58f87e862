"""The model that sees, once for each file of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_engine
from seeing_oracle import SeeingOracle
from tiny_vision import write_seeing_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeing")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> SeeingOracle:
    return SeeingOracle(write_seeing_model(folder, vllm_engine.DEMO_MODEL), folder)
