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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one engine follow each other, so that it is started once: pytest orders them by the
    places that an engine has in the lists of the tests, which are not the same."""

    def engine(item: pytest.Item) -> str:
        called = getattr(item, "callspec", None)
        return "" if called is None else str(called.params.get("llm", ""))

    items.sort(key=engine)


@pytest.fixture(scope="module")
def family() -> str:
    return "idefics3"


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(family)


@pytest.fixture(scope="module")
def oracle(family: str, folder: Path) -> SeeingOracle:
    from seeing_oracle import SeeingOracle
    from tiny_vision import FAMILIES, write_seeing_model

    model = write_seeing_model(folder, vllm_engine.DEMO_MODEL, family)
    return SeeingOracle(model, folder, FAMILIES[family])
