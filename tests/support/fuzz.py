"""Fuzzes every reader of files: `python tests/support/fuzz.py --seconds 600`.

A process of its own reads damaged files and reports on each: a file must be refused as a client's
mistake, or read to an artefact that survives its own canonical file. A process that dies, takes
more than `HANG_SECONDS` of CPU time over one file, or raises anything else is a finding, whose file
is kept. Files are numbered: `--only N` reads one again. Memory is the process's peak (VmHWM, reset
before each file) over what it held before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fuzz_corpus import Seed, is_sound, large_seeds, seeds
from fuzz_mutations import mutated

from steer.errors import SteerError
from steer.formats.options import ImportOptions

HANG_SECONDS = 20
_BLOCKED_SECONDS = 1800
ADDRESS_SPACE = 16 << 30
CONSTANT_BYTES = 8 << 20
_OPTIONS = (
    ImportOptions(layer_offset=-1),
    ImportOptions(layer_offset=2),
    ImportOptions(layers=(0, 1)),
    ImportOptions(source="blocks"),
    ImportOptions(source="hidden-states"),
    ImportOptions(source="llama-cpp-generator"),
    ImportOptions(source="refusal-direction", position=0),
)


@dataclass(frozen=True)
class Outcome:
    """What one file came to: `read`, a code it was refused with, or `WRONG: …`."""

    seed: str
    size: int
    result: str
    seconds: float
    peak: int


@dataclass
class Report:
    """What a campaign came to."""

    results: Counter[str] = field(default_factory=Counter)
    by_seed: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str, int] = (0.0, "", 0)
    heaviest: tuple[float, str, int, int, int] = (0.0, "", 0, 0, 0)
    findings: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def add(self, number: int, outcome: Outcome) -> None:
        self.results[outcome.result] += 1
        self.by_seed[outcome.seed] += 1
        self.slowest = max(self.slowest, (outcome.seconds, outcome.seed, number))
        over = outcome.peak - CONSTANT_BYTES - 2 * outcome.size
        found = (float(over), outcome.seed, number, outcome.peak, outcome.size)
        self.heaviest = max(self.heaviest, found) if self.heaviest[1] else found
        if outcome.result.startswith("WRONG") or over > 0:
            self.findings.append(
                f"{number} ({outcome.seed}, {outcome.size} bytes): {outcome.result}, "
                f"peak {outcome.peak}"
            )


def damaged_file(corpus: list[Seed], number: int) -> tuple[Seed, bytes, ImportOptions]:
    """The file with this number: always the same."""
    chance = random.Random(number)
    seed = corpus[number % len(corpus)]
    others = [chance.choice(corpus).data for _ in range(2)]
    data = mutated(seed.data, others, chance)
    options = seed.options if chance.random() < 0.8 else chance.choice(_OPTIONS)
    return seed, data, options


def read_one(seed: Seed, data: bytes, options: ImportOptions, folder: Path) -> Outcome:
    """Reads one file under `folder`, which is empty before and after."""
    path = folder / seed.filename
    path.write_bytes(data)
    for name, held in (seed.beside or {}).items():
        (folder / name).write_bytes(held)
    before = _reset_peak()
    started = time.perf_counter()
    artefact = None
    try:
        artefact = seed.parse(path, options)
        result = "read"
    except SteerError as error:
        result = error.code if 400 <= error.status < 500 else f"WRONG: {error.code}"
    except Exception as error:
        result = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - started
    peak = max(0, _memory("VmHWM") - before)
    if artefact is not None and not is_sound(artefact):
        result = "WRONG: read to an unsound artefact"
    for left in folder.iterdir():
        left.unlink()
    return Outcome(seed.name, len(data), result, seconds, peak)


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def _reset_peak() -> int:
    # What was freed before must not serve now, unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def work(start: int, stop: int | None, large: bool) -> None:
    """Reads files from number `start` on and prints an outcome for each, for `campaign`."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    corpus = large_seeds() if large else seeds()
    number = start
    gc.collect()
    gc.freeze()  # what is there now need not be looked through for every file
    with tempfile.TemporaryDirectory() as folder:
        while stop is None or number < stop:
            damaged = damaged_file(corpus, number)
            # In the process's own time, so that waiting for a busy machine is no hang. The signal
            # ends the process, which `campaign` reports.
            signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
            outcome = read_one(*damaged, Path(folder))
            line = [number, outcome.seed, outcome.size, outcome.result]
            print(json.dumps([*line, outcome.seconds, outcome.peak]), flush=True)
            number += 1


def campaign(seconds: float, *, first: int, large: bool, kept: Path) -> Report:
    """Fuzzes for `seconds` of the worker's own CPU time; damaged files that matter go to `kept`."""
    report, number = Report(), first
    while report.cpu_seconds < seconds:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        number = _watch(report, number, seconds - report.cpu_seconds, large)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report.cpu_seconds += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    corpus = large_seeds() if large else seeds()
    for finding in report.findings:
        which = int(finding.split(" ", 1)[0])
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{which}{'-large' if large else ''}").write_bytes(damaged_file(corpus, which)[1])
    return report


def _watch(report: Report, number: int, seconds: float, large: bool) -> int:
    """Runs one worker until it has used its time, died or hung; the number to go on with."""
    command = [sys.executable, __file__, "--worker", str(number), *(["--large"] if large else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        started = time.monotonic()
        for line in _lines(worker):
            if line is None:  # blocked, without using any time
                report.findings.append(f"{number} ({'large' if large else 'small'}): HANGS")
                worker.kill()
                return number + 1
            number, *outcome = json.loads(line)
            report.add(number, Outcome(*outcome))
            number += 1
            if time.monotonic() - started > min(seconds, 120):
                worker.kill()
                return number
        worker.wait()
        report.findings.append(
            f"{number} ({'large' if large else 'small'}): DIES {worker.returncode}"
        )
    return number + 1


def _lines(worker: subprocess.Popen[str]) -> Iterator[str | None]:
    """The worker's lines; None when one takes too long."""
    import selectors

    assert worker.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(worker.stdout, selectors.EVENT_READ)
    while True:
        if not selector.select(timeout=_BLOCKED_SECONDS):
            yield None
        line = worker.stdout.readline()
        if not line:
            return
        yield line


def shown(report: Report, title: str) -> str:
    """The report as text."""
    total = sum(report.results.values())
    refused = (
        total
        - report.results["read"]
        - sum(count for result, count in report.results.items() if result.startswith("WRONG"))
    )
    seconds, slow_seed, slow_number = report.slowest
    _, heavy_seed, heavy_number, peak, size = report.heaviest
    lines = [
        f"{title}: {total:,} files in {report.cpu_seconds:,.0f} CPU seconds",
        f"  refused {refused:,}, read {report.results['read']:,}",
        f"  slowest {seconds * 1e3:,.0f} ms ({slow_seed}, file {slow_number})",
        f"  nearest to the bound on memory: {peak / 2**20:.1f} MiB for {size:,} bytes "
        f"({heavy_seed}, file {heavy_number})",
        f"  findings {len(report.findings)}",
        *(f"    {finding}" for finding in report.findings[:50]),
        "  codes: "
        + ", ".join(f"{code} {count:,}" for code, count in report.results.most_common(40)),
    ]
    return "\n".join(lines)


def main(
    seconds: Annotated[
        float, typer.Option(help="CPU seconds, a quarter of them on large files.")
    ] = 600,
    first: Annotated[int, typer.Option(help="The number of the first file.")] = 0,
    kept: Annotated[Path, typer.Option(help="Where files that matter go.")] = Path("fuzz-findings"),
    only: Annotated[
        int | None, typer.Option(help="Read one file again and show what it raises.")
    ] = None,
    large: Annotated[bool, typer.Option(help="With --only: a large file.")] = False,
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fuzzes every reader of files and prints what came of it; exit code 1 for findings."""
    if worker is not None:
        work(worker, None, large)
        return
    if only is not None:
        _show_one(only, large)
        return
    small = campaign(seconds * 0.75, first=first, large=False, kept=kept)
    print(shown(small, "small files"), flush=True)
    big = campaign(seconds * 0.25, first=first, large=True, kept=kept)
    print(shown(big, "large files"))
    raise typer.Exit(1 if small.findings or big.findings else 0)


def _show_one(number: int, large: bool) -> None:
    seed, data, options = damaged_file(large_seeds() if large else seeds(), number)
    with tempfile.TemporaryDirectory() as folder:
        outcome: Any = read_one(seed, data, options, Path(folder))
        print(outcome)
        path = Path(folder) / seed.filename
        path.write_bytes(data)
        for name, held in (seed.beside or {}).items():
            (Path(folder) / name).write_bytes(held)
        print(seed.parse(path, options))


if __name__ == "__main__":
    typer.run(main)
