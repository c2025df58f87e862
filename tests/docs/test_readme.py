"""The README is run: its code, with the output it prints, and its specs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from doc_pages import ROOT, Page, outputs, session
from liveness import LIVENESS_SECONDS

pytestmark = pytest.mark.slow

README = ROOT / "README.md"
SPECS = re.findall(r"^```json\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_readme_prints_what_it_says(tmp_path: Path) -> None:
    page = Page.read(README)
    assert len(page.blocks) >= 4
    assert {block.language for block in page.blocks if block.not_run is None} == {"python", "bash"}
    assert sum(block.expected is not None for block in page.blocks) >= 3
    assert SPECS
    with session(page, tmp_path) as running:
        for block, printed in outputs(running):
            if block.expected is not None:
                assert printed == block.expected
        for spec in SPECS:
            url = f"{running.url}/v1/steering/validate"
            checked = httpx.post(
                url, json={"steering": json.loads(spec)}, timeout=LIVENESS_SECONDS
            ).json()
            assert checked["problems"] == []
