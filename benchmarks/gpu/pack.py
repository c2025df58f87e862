"""`python -m benchmarks.gpu.pack`: what a bare host needs, in pieces that can be carried.

Three packs, each a folder of pieces, a manifest with their checksums, and `unpack.py`, which needs
Python alone: Steer with the packages that it imports there, SmolLM2, and vLLM with its own torch.
Wheels are fetched by pip for the host's Python, in the releases that this environment has.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console

from benchmarks.child import ROOT
from benchmarks.gpu import unpack

HOST = ("torch", "triton", "numpy")
"""What the host has, in whatever release; nothing of it is brought."""

KERNEL = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("jaxtyping", "wadler-lindig", "safetensors", "gguf", "pyyaml"),
    *("typer", "click", "annotated-doc", "rich", "shellingham"),
    *("markdown-it-py", "mdurl", "pygments", "tqdm"),
)
"""What the parts `kernel` and `layer` import beside that: the kernel's tables are made from plans,
these from specs, which pydantic checks, and artefacts of any format; the rest is the command's."""

ENGINE = (
    *("transformers", "tokenizers", "huggingface-hub", "hf-xet", "regex", "packaging"),
    *("filelock", "fsspec", "httpx", "httpcore", "h11", "anyio", "idna", "certifi"),
    *("accelerate", "psutil", "jinja2", "markupsafe", "scipy", "requests", "urllib3"),
    "charset-normalizer",
)
"""What the part `engine` imports beside that."""

SERVER = (
    *("sqlalchemy", "greenlet", "alembic", "mako", "prometheus-client", "fastapi", "starlette"),
    *("openai", "uvicorn", "python-multipart", "jiter", "distro", "sniffio"),
    *("scikit-learn", "joblib", "threadpoolctl", "matplotlib", "contourpy", "cycler"),
    *("fonttools", "kiwisolver", "pillow", "pyparsing", "python-dateutil", "six"),
    *("pytest", "pytest-asyncio", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"),
)
"""What Steer on vLLM, and its tests, need beside that and beside what vLLM brings."""

_PLATFORMS = (
    "manylinux1_x86_64",
    "manylinux2010_x86_64",
    "manylinux2014_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in (12, 17, 24, 26, 27, 28, 31, 34, 35)),
)
_CARRIED = ("benchmarks", "tests", "pyproject.toml")
_MIB = 1 << 20
_RUN = "PYTHONPATH={site} python -m benchmarks gpu{options}"


class What(StrEnum):
    STEER = "steer"
    SMOLLM2 = "smollm2"
    VLLM = "vllm"


def main(
    out: Annotated[Path, typer.Argument(help="A new folder; each pack is a folder in it.")],
    what: Annotated[list[What] | None, typer.Option(help="Default: steer.")] = None,
    python: Annotated[
        str, typer.Option(help="The host's, as in 3.12.")
    ] = f"{sys.version_info.major}.{sys.version_info.minor}",
    piece_mib: Annotated[float, typer.Option(help="The largest piece.")] = 60.0,
    vllm: Annotated[str, typer.Option(help="The release of vLLM.")] = "0.32.0",
) -> None:
    """Packs what is asked for, and says how large it is and what to do with it."""
    console = Console(width=120)
    for one in what or [What.STEER]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if one is What.STEER:
                _steer(folder, python)
                site, options = "site", ""
            elif one is What.SMOLLM2:
                file = _smollm2(folder)
                site, options = "site", f" --model {file}"
            else:
                _vllm(folder, python, vllm)
                site, options = "site-vllm", " vllm --site site-vllm"
            run = _RUN.format(site="site", options=options)
            pieces = pack(folder, out / one, str(one), site, run, largest=int(piece_mib * _MIB))
        size = sum(path.stat().st_size for path in pieces) / _MIB
        console.print(
            f"{one}: {len(pieces)} pieces, {size:,.0f} MiB, in {out / one}. On the host, once all "
            f"are there:\n  python {one}/unpack.py {one}"
        )


def pack(folder: Path, out: Path, what: str, site: str, run: str, *, largest: int) -> list[Path]:
    """The content of `folder` as pieces of at most `largest` bytes in the new folder `out`, with a
    manifest and `unpack.py`; the wheels in `folder/wheels` will be put into `site`.

    Raises `ValueError` where `out` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something: name a new folder, or empty it")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as joined:
        with tarfile.open(fileobj=joined, mode="w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        joined.seek(0)
        pieces = [_written(out / f"{what}-{n:03}", block) for n, block in _blocks(joined, largest)]
    listed = [{"name": one.name, "sha256": unpack.sha256(one)} for one in pieces]
    manifest = {
        "what": what,
        "site": site,
        "wheels": "wheels",
        "run": run,
        "pieces": listed,
        # Of all pieces, in their order: what an unpacked folder is known by.
        "sha256": hashlib.sha256("".join(p["sha256"] for p in listed).encode()).hexdigest(),
    }
    (out / unpack.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copy(unpack.__file__, out / "unpack.py")
    return pieces


def fetch(names: Sequence[str], folder: Path, python: str, *, needs: bool = False) -> None:
    """Wheels for the host's Python, in `folder`; with `needs` also of all that they require."""
    folder.mkdir(exist_ok=True)
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *(() if needs else ("--no-deps",)),
        *(*platforms, "--dest", str(folder), *names),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise typer.BadParameter(f"pip could not fetch the wheels:\n{done.stderr.strip()}")


def pinned(names: Sequence[str]) -> list[str]:
    """The releases that are installed here, with which the parts were tried."""
    return [f"{name}=={version(name)}" for name in names]


def _steer(folder: Path, python: str) -> None:
    """Steer as a wheel, which plugins are found by, the benchmarks and the tests."""
    _own_wheel(folder / "wheels")
    fetch(pinned([*KERNEL, *ENGINE]), folder / "wheels", python)
    listed = subprocess.run(
        ["git", "ls-files", "-z", *_CARRIED], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)


def _own_wheel(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        # A copy: building leaves folders behind, which must not be the checkout's.
        copy = Path(name) / "steer"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(".*", "build", "tests", "docs", "*.egg-info", "var"),
            symlinks=True,
        )
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
                *("--no-build-isolation", "--wheel-dir", str(folder), str(copy)),
            ],
            check=True,
        )


def _smollm2(folder: Path) -> str:
    """The model's own file, which Steer converts where it is loaded."""
    from steer.engines.transformers.checkpoints.found import find_model, known_file  # noqa: PLC0415

    known = find_model("smollm2").known
    assert known is not None
    source = known_file(known)
    name = f"{source.stem}.gguf" if source.suffix != ".gguf" else source.name
    shutil.copy(source, folder / name)
    return name


def _vllm(folder: Path, python: str, release: str) -> None:
    """vLLM and all that it requires, its torch too, and what Steer needs beside that."""
    wheels = folder / "wheels"
    fetch([f"vllm=={release}"], wheels, python, needs=True)
    there = {_project(path) for path in wheels.glob("*.whl")}
    names = [name for name in (*KERNEL, *ENGINE, *SERVER) if name.replace("-", "_") not in there]
    fetch(pinned(names), wheels, python)


def _project(wheel: Path) -> str:
    return wheel.name.split("-")[0].lower().replace("-", "_").replace(".", "_")


def _blocks(source: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    while block := source.read(size):
        yield number, block
        number += 1


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    typer.run(main)
