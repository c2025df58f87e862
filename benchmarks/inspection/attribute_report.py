"""The attribute sweep as a command runs it: a server, the three parts in turn, tables and JSON."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.inspection import attribute_sweep as attribute
from benchmarks.inspection.attribute_sweep import STATISTICS, Said, Sampled, Sweep
from benchmarks.inspection.chat_latency import Latency
from benchmarks.inspection.one_by_one import OneByOne
from benchmarks.intervals import of_rounds
from benchmarks.machine import machine
from benchmarks.server import Server
from steer.engines.transformers.checkpoints.found import find_model
from steer.engines.transformers.checkpoints.loading import load_tokenizer

NAME = "model"
AIM = 20.0
"""How many times as fast a sweep should be as its cells one by one."""


@dataclass(frozen=True)
class Asked:
    """What the command was asked for, besides the model."""

    prompts: int
    every: int
    tokens: int
    sample: float
    turns: int
    turn_seconds: float
    chat_tokens: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """All parts: seconds of the sweep and its cells, the sample, and chats alone and beside it."""

    sweep: Sweep
    seconds: float
    sampled: Sampled
    agreement: float
    alone: Sequence[Latency]
    beside: Sequence[Latency]

    @property
    def cell(self) -> float:
        """Seconds of a cell within the sweep."""
        return self.seconds / self.sweep.cells

    @property
    def ratios(self) -> list[float]:
        """How many times as long each cell took by itself."""
        return [one / self.cell for one in self.sampled.seconds]


def measure(model: str, asked: Asked) -> Measured:
    """Raises `ValueError` for more prompts than there are subjects."""
    found = find_model(model)
    torch.set_num_threads(asked.threads)
    plain = OneByOne(found.location)
    last = plain.layers - 1
    sweep = Sweep.of(asked.prompts, range(last % asked.every, last + 1, asked.every), asked.tokens)
    with tempfile.TemporaryDirectory() as folder, _served(model, Path(folder), asked) as server:
        with tqdm(total=sweep.cells, desc="sweep", unit="cell", leave=False) as bar:
            started = time.perf_counter()
            said: dict[attribute.Cell, Said] = server.run(
                lambda http: attribute.swept(http, sweep, bar.update)
            )
            seconds = time.perf_counter() - started
        pairs = max(1, round(asked.sample * len(sweep.layers) ** 2))
        total = pairs * len(sweep.subjects)
        with tqdm(total=total, desc="one by one", unit="cell", leave=False) as bar:
            tokenizer = load_tokenizer(found.location)
            sampled = attribute.one_by_one(plain, tokenizer, sweep, asked.sample, bar.update)
        with tqdm(total=2 * asked.turns, desc="chats", unit="turn", leave=False) as bar:
            alone, beside = attribute.meanwhile(
                server, NAME, sweep, turns=asked.turns, seconds=asked.turn_seconds,
                tokens=asked.chat_tokens, done=bar.update,
            )  # fmt: skip
    agree = attribute.agreement(sampled.said, said)
    return Measured(sweep, seconds, sampled, agree, alone, beside)


@contextmanager
def _served(model: str, folder: Path, asked: Asked) -> Iterator[Server]:
    words = [
        *(str(Path(sys.executable).with_name("steer")), "serve", "--model", model),
        *("--served-name", NAME, "--port", "PORT", "--registry", str(folder / "registry")),
        *("--dtype", "float32"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
    server = Server(words, folder / "server.log", environment)
    try:
        server.wait()
        yield server
    finally:
        server.close()


def show(model: str, found: Measured, console: Console) -> None:
    sweep, sampled = found.sweep, found.sampled
    layers = len(sweep.layers)
    title = (
        f"{model}: {len(sweep.subjects)} subjects × {layers} × {layers} layers, "
        f"{sweep.tokens} token{'s' if sweep.tokens > 1 else ''} each"
    )
    table = Table("", "cells", "timed", "ms per cell", "all cells, s", title=title)
    each = of_rounds([1e3 * one for one in sampled.seconds])
    alone = each.value / 1e3 * sweep.cells
    table.add_row(
        "one by one", f"{sweep.cells:,}", f"{len(sampled.seconds):,}", _told(each), f"{alone:,.0f}"
    )
    table.add_row(
        "the sweep, over HTTP", f"{sweep.cells:,}", f"{sweep.cells:,}", f"{1e3 * found.cell:.2f}",
        f"{found.seconds:,.1f}",
    )  # fmt: skip
    console.print(table)
    times = of_rounds(found.ratios)
    said = "met" if times.low >= AIM else "not met" if times.high < AIM else "undecided"
    console.print(
        f"faster by {_told(times)} (aim ≥ {AIM:g} ×: {said}); medians over the cells timed, 95 % "
        f"intervals. Of these cells {found.agreement:.1%} say the same both ways."
    )
    table = Table("chats, ms", "alone", "beside the sweep", "times", title="meanwhile")
    one, other = (sum(each, Latency((), (), ())) for each in (found.alone, found.beside))
    for name, statistic in STATISTICS.items():
        pairs = zip(found.alone, found.beside, strict=True)
        ratio = of_rounds([statistic(b) / statistic(a) for a, b in pairs])
        table.add_row(
            name, f"{1e3 * statistic(one):.1f}", f"{1e3 * statistic(other):.1f}", _told(ratio)
        )
    console.print(table)


def as_json(model: str, asked: Asked, found: Measured) -> dict[str, Any]:
    """Everything that was measured, not yet summed up."""
    return {
        "machine": machine(("torch", "transformers")),
        "model": model,
        "asked": asdict(asked),
        "layers": list(found.sweep.layers),
        "cells": found.sweep.cells,
        "sweep_seconds": found.seconds,
        "one_by_one_seconds": list(found.sampled.seconds),
        "agreement": found.agreement,
        "alone": [asdict(one) for one in found.alone],
        "beside": [asdict(one) for one in found.beside],
    }


def _told(interval: Any) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
