"""`python -m benchmarks vllm`: in the environment of `make vllm`, on an otherwise idle machine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tqdm import tqdm

from benchmarks.child import ROOT
from benchmarks.kept import Kept
from benchmarks.machine import machine, sources
from benchmarks.vllm import chats, decoding, serving
from benchmarks.vllm.pair import Pair, Settings
from benchmarks.vllm.report import PACKAGES, Table
from benchmarks.vllm.shapes import SHAPES, SLOTS, Shape, register
from steer.registry.registry import Registry


class Mode(StrEnum):
    EAGER = "eager"
    COMPILED = "compiled"


class ShapeName(StrEnum):
    LARGE = "100m"
    DEMO = "demo"
    SMOLLM2 = "smollm2"
    HUGE = "8b"


class Part(StrEnum):
    DECODE = "decode"
    READ = "read"
    DISTINCT = "distinct"
    HTTP = "http"
    PEERS = "peers"
    REGISTRY = "registry"


_EVERY_START = {Part.DECODE, Part.READ, Part.DISTINCT, Part.HTTP}
_BY_DEFAULT = (ShapeName.LARGE, ShapeName.DEMO)
_FEW = 5
"""Rounds at most of what is far from its aim, and takes long."""


def main(
    starts: Annotated[int, typer.Option(help="Times that engines and servers are started.")] = 5,
    rounds: Annotated[int, typer.Option(help="Counted rounds of each start.")] = 4,
    shape: Annotated[list[ShapeName] | None, typer.Option(help="Default: 100m, demo.")] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="Default: both.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Default: 1, 8, 32, 64.")] = None,
    names: Annotated[list[int] | None, typer.Option(help="Default: 10, 1000, 100000.")] = None,
    steps: Annotated[int, typer.Option(help="Decode steps of one round.")] = 32,
    chats: Annotated[int, typer.Option(help="Of a job over HTTP, all at once.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of each answer over HTTP.")] = 32,
    threads: Annotated[int, typer.Option(help="OpenMP threads of each contestant.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of every engine.")] = "float32",
    out: Annotated[Path, typer.Option(help="The JSON file.")] = ROOT / "build" / "bench-vllm.json",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with the file.")] = False,
) -> None:
    """Two engines, one without Steer's plugin, take turns, and are started anew several times:
    `decode`, `read` and `distinct` on every shape, `http`, `peers` and `registry` where there is a
    tokenizer.
    A run that was cut off goes on where it was."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the peers' processes too
    # However it is ended, the processes that it started are.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    options = Options(
        starts, rounds, batch or [1, 8, 32, SLOTS], names or [10, 1000, 100_000],
        steps, chats, tokens, threads, dtype,
    )  # fmt: skip
    here = {**machine(PACKAGES), "sources": sources("steer", "steer_server", "benchmarks")}
    # More starts may be added to those that a file has.
    settings = {key: value for key, value in asdict(options).items() if key != "starts"}
    try:
        kept = Kept.at(out, {**settings, "turn": decoding.TURN}, here, fresh=fresh)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(width=170)
    console.print(kept.machine)
    cases = [(one, each) for one in shape or _BY_DEFAULT for each in mode or Mode]
    parts = [one for one in Part if one in (part or Part)]
    # Outermost, so that every case meets every hour of the run.
    for number in tqdm(range(starts), desc="starts", leave=False):
        for name, how in cases:
            _start(kept, Case(SHAPES[name], how, options), parts, number)
    for name, how in cases:
        for table in _tables(kept, Case(SHAPES[name], how, options), parts):
            table.show(console)


@dataclass(frozen=True)
class Options:
    starts: int
    rounds: int
    batches: list[int]
    names: list[int]
    steps: int
    chats: int
    tokens: int
    threads: int
    dtype: str


@dataclass(frozen=True)
class Case:
    """A shape in one mode."""

    shape: Shape
    mode: Mode
    options: Options

    def folder(self, part: Part) -> str:
        """Where its results are kept."""
        return f"{part}/{self.shape.name}/{self.mode}"

    def parts(self, wanted: list[Part]) -> list[Part]:
        """Those that this shape has: a random model has no tokenizer."""
        alone = (Part.DECODE, Part.READ, Part.DISTINCT)
        return [one for one in wanted if self.shape.found is not None or one in alone]

    @property
    def settings(self) -> Settings:
        eager = self.mode is Mode.EAGER
        drawn = self.shape.name == ShapeName.HUGE  # too large to be written
        return Settings(eager, self.options.threads, self.options.dtype, weights=not drawn)


def _start(kept: Kept, case: Case, wanted: list[Part], number: int) -> None:
    """What is missing of start `number`, each part kept as soon as it is measured."""
    left = [
        (one, name)
        for one in case.parts(wanted)
        if (one in _EVERY_START or number == 0)
        and (name := f"{case.folder(one)}/{number}") not in kept
    ]
    if not left:
        return
    with _files(case) as files:
        for one, name in left:
            if one == Part.HTTP:
                kept.keep(name, _serve(case, files))
        in_process = [(one, name) for one, name in left if one != Part.HTTP]
        if in_process:
            control = any(one in (Part.DECODE, Part.READ) for one, _ in in_process)
            with Pair(
                files.model, files.registry, files.folder, case.settings, control=control
            ) as pair:
                for one, name in in_process:
                    kept.keep(name, _measured(one, pair, case, files))


@dataclass(frozen=True)
class Files:
    """The folder of everything that is written, and in it the model and the registry."""

    folder: Path
    model: Path
    registry: Path


@contextlib.contextmanager
def _files(case: Case) -> Iterator[Files]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Registry.open(folder / "registry") as registry:
            register(registry, case.shape)
        model = case.shape.model(folder, weights=case.settings.weights)
        yield Files(folder, model, folder / "registry")


def _serve(case: Case, files: Files) -> Any:
    options = case.options
    return serving.measure(
        case.shape, files.model, files.registry, files.folder, case.settings,
        rounds=options.rounds, chats=options.chats, tokens=options.tokens,
    )  # fmt: skip


def _measured(part: Part, pair: Pair, case: Case, files: Files) -> Any:
    options, shape, mode = case.options, case.shape, case.mode
    lengths = {"rounds": options.rounds, "steps": options.steps}
    few = min(options.rounds, _FEW)
    if part == Part.DECODE:
        return decoding.measure(pair, shape, decoding.ALL, options.batches, **lengths)
    if part == Part.READ:
        return decoding.measure(pair, shape, decoding.READ, options.batches, **lengths)
    if part == Part.DISTINCT:
        diets = decoding.distinct_diets(mode)
        return decoding.measure(pair, shape, diets, [SLOTS], **lengths)
    if part == Part.PEERS:
        found = chats.against_peers(
            pair, shape, mode, model=files.model, registry=files.registry, rounds=few
        )
    else:
        found = chats.against_registry(
            pair, shape, mode, model=files.model, folder=files.folder, sizes=options.names,
            rounds=few,
        )  # fmt: skip
    return asdict(found)


def _tables(kept: Kept, case: Case, wanted: list[Part]) -> Iterator[Table]:
    """All that was measured of one case; Steer's own work alone is timed for it here, once."""
    shape, mode, batches = case.shape, case.mode, case.options.batches
    of_case = f"{shape.name}, {mode}"
    for part in case.parts(wanted):
        starts = kept.below(case.folder(part))
        if part == Part.DECODE:
            yield decoding.table(f"Decoding: {of_case}", mode, decoding.ALL, starts)
            if shape.name != ShapeName.HUGE:
                yield from _alone(kept, case, batches, starts)
        elif part == Part.READ:
            title = f"Decoding while tokens are read: {of_case}"
            yield decoding.table(title, mode, decoding.READ, starts)
        elif part == Part.DISTINCT:
            title = f"Distinct specs in a batch: {of_case}"
            yield decoding.table(title, mode, decoding.distinct_diets(mode), starts)
        elif part == Part.HTTP:
            title = f"{case.options.chats} chats × {case.options.tokens} tokens over HTTP"
            yield serving.table(f"{title}: {of_case}", shape, starts)
        else:
            yield from (Table(**one) for one in starts)


def _alone(kept: Kept, case: Case, batches: list[int], starts: list[Any]) -> Iterator[Table]:
    """Where noise hides an answer: Steer's own work without the model."""
    shape, mode = case.shape, case.mode
    name = f"alone/{shape.name}/{mode}"
    if name not in kept:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "registry"
            with Registry.open(place) as registry:
                register(registry, shape)
            work = decoding.own_work(shape, mode, place, batches, starts)
        kept.keep(name, [asdict(work), asdict(decoding.idle_taps(shape, mode, batches, starts))])
    yield from (Table(**one) for one in kept[name])
