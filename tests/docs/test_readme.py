"""The README is run: its Python against a live server, with the output it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_pages import ROOT, Page, outputs, session

pytestmark = pytest.mark.slow


def test_the_readme_prints_what_it_says(tmp_path: Path) -> None:
    page = Page.read(ROOT / "README.md")
    assert len(page.blocks) >= 4
    assert sum(block.expected is not None for block in page.blocks) >= 3
    with session(page, tmp_path) as running:
        for block, printed in outputs(running):
            if block.expected is not None:
                assert printed == block.expected
