"""docs/clients.md is run against the demo model: each client as it comes, in its environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from doc_pages import ROOT, Block, Page, Session, agrees, session

pytestmark = pytest.mark.slow

PAGE = Page.read(ROOT / "docs" / "clients.md")
RUN = [block for block in PAGE.blocks if block.not_run is None]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with session(PAGE, tmp_path_factory.mktemp("clients")) as opened:
        yield opened


@pytest.mark.parametrize("block", RUN, ids=lambda block: f"line-{block.line}")
def test_a_client_steers_as_the_page_shows(running: Session, block: Block) -> None:
    assert block.expected is not None
    assert agrees(running.run(block), block.expected)
