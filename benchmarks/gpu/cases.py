"""Cases that are run one after the other as long as there is time, each kept when it is done."""

from __future__ import annotations

import gc
import importlib.util
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm

from benchmarks.gpu.device import Device
from benchmarks.kept import Kept
from benchmarks.vllm.report import Table

Result = dict[str, Any]
Results = Iterator[tuple[str, Result]]
"""What was found, by the names of cases within their part."""

TRIES = 2
"""A case that failed, or was cut off, is tried once more, and then left out."""


@dataclass(frozen=True)
class Case:
    """`name` is unique in a run, and says all that the result depends on."""

    name: str
    run: Callable[[], Result]


class Part(Protocol):
    """Cases that share a table; what they share is made when the first of them runs."""

    def missing(self) -> str | None:
        """What this host lacks for it; None where it can run."""

    def cases(self) -> Iterator[Case]:
        """In the order in which they are run."""

    def table(self, found: Results) -> Table: ...


@dataclass(frozen=True)
class Progress:
    """How many cases have a result now, how many failed for good, and how many are left."""

    done: int
    failed: int
    left: int


def run_cases(
    kept: Kept,
    cases: Iterable[Case],
    device: Device,
    *,
    limit_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Runs what has no result yet; begins no case when the limit is over.

    A case is written down before it begins: one that takes the process with it is known by that.
    Raises `RuntimeError` where the device is lost, which needs a new process.
    """
    started, every = clock(), list(cases)
    for case in tqdm(every, leave=False, disable=None):
        before = kept.get(case.name, {"tries": 0})
        if "tries" not in before or before["tries"] >= TRIES:
            continue
        if clock() - started >= limit_seconds:
            break
        tries = before["tries"] + 1
        kept.keep(case.name, {"error": "it was cut off", "tries": tries})
        try:
            result = case.run()
            device.wait()
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            kept.keep(case.name, {"error": text, "tries": tries})
            tqdm.write(f"{case.name}: {text.splitlines()[-1]}")
            _check(device)
            _empty(device)
            continue
        kept.keep(case.name, result)
    return _progress(kept, every)


def results(kept: Kept, part: str) -> Results:
    """The names, without the part's, and the results of its cases, failed ones too."""
    for name, result in kept.results.items():
        if name.startswith(f"{part}/"):
            yield name.removeprefix(f"{part}/"), result


def lacking(*packages: str) -> str | None:
    """Which of `packages` cannot be imported here, in words; None where all can."""
    gone = [name for name in packages if importlib.util.find_spec(name) is None]
    if not gone:
        return None
    return f"{', '.join(gone)} cannot be imported here: bring them with benchmarks.gpu.pack"


def _progress(kept: Kept, cases: list[Case]) -> Progress:
    found = [kept.get(case.name, {"tries": 0}) for case in cases]
    failed = sum(one.get("tries", 0) >= TRIES for one in found)
    left = sum(one.get("tries", TRIES) < TRIES for one in found)
    return Progress(len(cases) - failed - left, failed, left)


def _check(device: Device) -> None:
    try:
        device.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"the device was lost ({error}): run the same command again, which goes on with the "
            "next case"
        ) from error


def _empty(device: Device) -> None:
    """A case that ran out of memory must leave it to the next one."""
    gc.collect()
    if device.torch.type == "cuda":
        torch.cuda.empty_cache()
