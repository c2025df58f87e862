"""Packing for a bare host, and unpacking there with Python alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import pack, unpack

LARGEST = 700


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A wheel and two files, as they are packed."""
    found = tmp_path / "folder"
    (found / "benchmarks" / "deep").mkdir(parents=True)
    (found / "benchmarks" / "deep" / "a.py").write_text("A = 1\n")
    (found / "data.bin").write_bytes(bytes(range(256)) * 16)
    (found / "wheels").mkdir()
    with zipfile.ZipFile(found / "wheels" / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small/__init__.py", "B = 2\n")
        wheel.writestr("small-1.0.dist-info/METADATA", "Name: small\nVersion: 1.0\n")
        wheel.writestr("small-1.0.data/platlib/small/native.so", "native")
        wheel.writestr("small-1.0.data/scripts/small", "#!python")
    return found


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out" / "small"
    pieces = pack.pack(folder, out, "small", "site", "run it", largest=LARGEST)
    assert len(pieces) > 5
    assert all(one.stat().st_size <= LARGEST for one in pieces)
    return out


def test_what_is_packed_comes_out_again_with_python_alone(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "host"
    command = [sys.executable, "-I", str(packed / "unpack.py"), str(packed), str(target)]
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "run it" in done.stdout
        assert (target / "data.bin").read_bytes() == bytes(range(256)) * 16
        assert (target / "benchmarks" / "deep" / "a.py").read_text() == "A = 1\n"
        assert (target / "site" / "small" / "__init__.py").read_text() == "B = 2\n"
        assert (target / "site" / "small" / "native.so").exists()
        assert (target / "site" / "small-1.0.dist-info" / "METADATA").exists()
        assert not (target / "site" / "small-1.0.data").exists()
        (target / "site" / "small" / "kept").touch()
    assert not list((target / "wheels").iterdir())


@pytest.mark.parametrize("fault", ["missing", "short", "changed"])
def test_a_piece_that_did_not_arrive_whole_is_named(
    packed: Path, tmp_path: Path, fault: str
) -> None:
    piece = packed / "small-002"
    content = piece.read_bytes()
    if fault == "missing":
        piece.unlink()
    else:
        piece.write_bytes(content[:-1] if fault == "short" else content[:-1] + b"?")
    with pytest.raises(unpack.Broken, match="small-002"):
        unpack.unpack(packed, tmp_path / "host")
    assert not (tmp_path / "host").exists()
    piece.write_bytes(content)
    unpack.unpack(packed, tmp_path / "host")


def test_a_wheel_cannot_write_outside_of_its_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("../outside.py", "")
    with pytest.raises(unpack.Broken, match="outside"):
        unpack.install(tmp_path / "bad-1-py3-none-any.whl", tmp_path / "site")
    assert not (tmp_path / "outside.py").exists()


def test_a_folder_that_holds_something_is_left_alone(folder: Path, packed: Path) -> None:
    with pytest.raises(ValueError, match="holds something"):
        pack.pack(folder, packed, "small", "site", "run it", largest=LARGEST)


def test_what_is_brought_is_what_was_tried_here() -> None:
    names = [*pack.KERNEL, *pack.ENGINE]
    assert len(names) == len(set(names))
    assert not set(names) & set(pack.HOST)
    assert all("==" in one for one in pack.pinned(names))


KERNEL_ALONE = """
import sys
sys.path[:0] = [{root!r}]
allowed = {allowed!r} | sys.stdlib_module_names | {{"steer", "steer_vectors", "benchmarks"}}

class OfHost:
    # Finds what is allowed, and nothing else: as a host without the rest.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top.startswith("_"):
            return self.finder.find_spec(name, path, target)

    def invalidate_caches(self):
        pass

    def find_distributions(self, context=None):
        return getattr(self.finder, "find_distributions", lambda _: ())(context)

sys.meta_path[:] = [OfHost(one) for one in sys.meta_path]
import {module}
"""
MODULES = {"pyyaml": "yaml", "pydantic-core": "pydantic_core", "annotated-types": "annotated_types"}


def modules(names: tuple[str, ...]) -> set[str]:
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


# What torch itself imports, where it is there, is the host's.
HOST = {
    "torch",
    "triton",
    "numpy",
    "torchgen",
    "functorch",
    "mpmath",
    "sympy",
    "networkx",
    "jinja2",
    "markupsafe",
}


@pytest.mark.parametrize(
    ("module", "brought"),
    [
        ("benchmarks.gpu.command", pack.KERNEL),
        ("benchmarks.gpu.share", pack.KERNEL),
        ("benchmarks.gpu.engine", (*pack.KERNEL, *pack.ENGINE)),
    ],
)
def test_a_part_imports_nothing_but_what_the_host_has_or_is_brought(
    module: str, brought: tuple[str, ...]
) -> None:
    root = str(Path(__file__).parents[4])
    program = KERNEL_ALONE.format(root=root, allowed=HOST | modules(brought), module=module)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
