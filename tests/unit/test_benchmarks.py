"""Benchmarks and recipes are run by hand and rarely: that they still load is checked here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"benchmarks": "benchmarks", "vectors/demo/recipe": "steer_vectors.demo.recipe"}
# Scripts for peers' environments, and commands that run when they are loaded.
LEFT_OUT = {"peer_scripts", "__main__", "__init__"}


def modules() -> list[str]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not LEFT_OUT & set(parts):
                found.append(".".join((package, *parts)))
    return found


@pytest.mark.parametrize("name", modules())
def test_it_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module(name).__doc__
    assert name in sys.modules
