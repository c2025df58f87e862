"""What is shipped and what is public."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import steer

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_in_the_tree_is_shipped() -> None:
    """The list is explicit, so a new folder is easily forgotten."""
    setuptools = project()["tool"]["setuptools"]
    found = set()
    for name, folder in setuptools["package-dir"].items():
        root = ROOT / folder
        for init in root.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(root).parts]))
    assert set(setuptools["packages"]) == found


def test_every_package_says_that_it_is_typed() -> None:
    assert (ROOT / "steer" / "py.typed").exists()
    assert (ROOT / "server" / "steer_server" / "py.typed").exists()


def test_the_public_names() -> None:
    assert set(steer.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(steer, name) is not None


PUBLIC = {
    "Card",
    "ControlVector",
    "LowRankAdapter",
    "SteerError",
    "SteeringSpec",
    "attach",
    "parse_spec",
}


def test_importing_steer_does_not_import_transformers() -> None:
    """It takes seconds, and a client that only writes specs has no use for it."""
    code = "import sys, steer; sys.exit('transformers' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_import_order_holds() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
