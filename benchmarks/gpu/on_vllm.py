"""vLLM itself on a GPU: the contract with both forms, and engines side by side.

Each case is a command of its own: vLLM brings its own torch, and an engine cannot be torn down
completely in the process that ran it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.gpu.cases import Case, Result, Results, lacking
from benchmarks.vllm.report import Table, percent

PART = "vllm"
_TESTS = ("test_contract", "test_contract_compiled", "test_smollm2")
_LAST = 4000


@dataclass(frozen=True)
class Pairs:
    """Options of `python -m benchmarks vllm` that fit into some minutes."""

    shape: str
    options: Sequence[str]


PAIRS = (
    Pairs("8b", ("--starts", "2", "--rounds", "3", "--batch", "1", "--batch", "32")),
    Pairs("demo", ("--starts", "2", "--rounds", "5", "--batch", "1", "--batch", "64")),
)


class Commands:
    """`site` is the folder that vLLM and its torch were unpacked to; None where they are
    installed. A command that runs at `until`, by `time.monotonic`, is ended."""

    def __init__(self, site: Path | None, folder: Path, *, until: float) -> None:
        self._site, self._folder, self._until = site, folder, until

    def cases(self) -> Iterator[Case]:
        for name in _TESTS:
            yield Case(f"{PART}/tests/{name}", partial(self._tests, name))
        for pairs in PAIRS:
            yield Case(f"{PART}/pairs/{pairs.shape}", partial(self._pairs, pairs))

    def missing(self) -> str | None:
        """Why there is nothing to run; None where vLLM can be imported."""
        if self._site is not None:
            there = (self._site / "vllm").is_dir()
            return None if there else f"there is no vLLM in {self._site}"
        return lacking("vllm")

    def table(self, found: Results) -> Table:
        rows = [row for name, result in found for row in _rows(name, result)]
        return Table("vLLM", ("what", "found", "holds"), rows)

    def _tests(self, name: str) -> Result:
        done = self._run([*("-m", "pytest", "-q"), f"tests/vllm/{name}.py"])
        counts = re.findall(r"(\d+) (passed|failed|error|errors|skipped)", done)
        found = {what: int(number) for number, what in counts}
        bad = any(found.get(what) for what in ("failed", "error", "errors"))
        return {
            "counts": found,
            "holds": bool(found.get("passed")) and not bad,
            "output": done[-_LAST:],
        }

    def _pairs(self, pairs: Pairs) -> Result:
        out = self._folder / f"bench-gpu-vllm-{pairs.shape}.json"
        self._run(
            [
                *("-m", "benchmarks", "vllm", "--part", "decode", "--shape", pairs.shape),
                *("--mode", "compiled", "--dtype", "bfloat16", "--out", str(out), *pairs.options),
            ]
        )
        starts = json.loads(out.read_text())["results"]
        return {
            "file": out.name,
            "starts": [one for name, one in starts.items() if "decode" in name],
        }

    def _run(self, words: Sequence[str]) -> str:
        """What the command printed. Raises `RuntimeError`, with its last words, where it fails."""
        seconds = max(1.0, self._until - time.monotonic())
        path = [str(ROOT), *([str(self._site)] if self._site is not None else []), *sys.path[1:]]
        try:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "VLLM_PLUGINS": "steer"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("it was not done in the time that was left") from error
        if done.returncode not in (0, 1):  # 1: tests failed, which their counts tell
            raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-_LAST:]}")
        return done.stdout


def _rows(name: str, result: Result) -> Iterator[tuple[str, str, str]]:
    from benchmarks.vllm.decoding import of  # noqa: PLC0415 (the registry's packages)

    if "tries" in result:
        yield (name, str(result["error"])[:100], "NO")
    elif name.startswith("tests/"):
        told = ", ".join(f"{n} {what}" for what, n in result["counts"].items())
        yield (name, told, "yes" if result["holds"] else "NO")
    else:
        for case in result["starts"][0]:
            what = f"{name}, batch {case['batch']}, {case['diet']}"
            ratios = of(result["starts"], case["diet"], case["batch"], "ratio")
            yield (what, percent(ratios), "")
