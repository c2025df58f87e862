"""What a benchmark runs on: the machine, the releases, and the sources that are measured."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSING = ("date", "load")
"""What may differ between two parts of one run."""


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """The machine and when, with the releases of those `packages` that this environment has."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: found for name in packages if (found := _version(name))},
        "date": datetime.date.today().isoformat(),
    }


def sources(*packages: str) -> str:
    """A hash of the code below `packages` as it is imported: results of two states of it are not to
    be mixed."""
    found = hashlib.sha256()
    for package in packages:
        folder = Path(__import__(package).__file__ or "").parent
        for path in sorted(folder.rglob("*.py")):
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs of `machine` say the same, but for what passes."""
    return {k: v for k, v in one.items() if k not in PASSING} == {
        k: v for k, v in other.items() if k not in PASSING
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
