"""The page about captures is run, and prints what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_pages import ROOT, Page, agrees, outputs, session


@pytest.mark.slow
def test_the_page_prints_what_it_shows(tmp_path: Path) -> None:
    page = Page.read(ROOT / "docs" / "capturing.md")
    assert all(block.not_run is None for block in page.blocks)
    shown = 0
    with session(page, tmp_path) as running:
        for block, printed in outputs(running):
            if block.expected is not None:
                shown += 1
                assert agrees(printed, block.expected), f"line {block.line}: {printed}"
    assert shown >= 3
