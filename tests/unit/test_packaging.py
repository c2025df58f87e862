"""What is shipped and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.endpoint_plugins"])
def test_vllm_finds_what_it_is_told_to_load(group: str) -> None:
    """vLLM only logs a plugin that does not load; read, not imported, because vLLM is not here."""
    (declared,) = project()["project"]["entry-points"][group].values()
    assert [point.value for point in entry_points(group=group, name="steer")] == [declared]
    module, _, name = declared.partition(":")
    package, _, rest = module.partition(".")
    folder = project()["tool"]["setuptools"]["package-dir"][package]
    source = (ROOT / folder / rest.replace(".", "/")).with_suffix(".py").read_text()
    defined = (ast.FunctionDef, ast.ClassDef)
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, defined)}


def test_every_folder_of_tests_is_run() -> None:
    """By pytest, or by tests/vllm/run.sh; the list is explicit here too."""
    listed = project()["tool"]["pytest"]["ini_options"]["testpaths"]
    tests = (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    assert {"/".join(path.parts[:2]) for path in tests} - {"tests/vllm"} == set(listed)


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


def test_python_m_steer_is_the_command_line() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "steer", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("steer ")
