"""The model that sees, once for each file of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import vllm_engine

if TYPE_CHECKING:
    from seeing_oracle import SeeingOracle

# transformers' models import Triton, which the file on runner V2 has to have interpreted first: so
# they are imported in the fixtures.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeing")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> SeeingOracle:
    from seeing_oracle import SeeingOracle
    from tiny_vision import write_seeing_model

    return SeeingOracle(write_seeing_model(folder, vllm_engine.DEMO_MODEL), folder)
