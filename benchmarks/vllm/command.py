"""`python -m benchmarks vllm`: in the environment of `make vllm`, on an otherwise idle machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.child import ROOT
from benchmarks.vllm import chats, decoding
from benchmarks.vllm.diets import DIETS, TRIGGERED
from benchmarks.vllm.pair import Pair
from benchmarks.vllm.report import Report
from benchmarks.vllm.shapes import SHAPES, SLOTS, register
from steer.registry.registry import Registry


class Mode(StrEnum):
    EAGER = "eager"
    COMPILED = "compiled"


class ShapeName(StrEnum):
    LARGE = "100m"
    DEMO = "demo"


class Part(StrEnum):
    DECODE = "decode"
    DISTINCT = "distinct"
    PEERS = "peers"
    REGISTRY = "registry"


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds of each case.")] = 9,
    shape: Annotated[list[ShapeName] | None, typer.Option(help="Default: all.")] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="Default: both.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Default: 1, 8, 32, 64.")] = None,
    names: Annotated[list[int] | None, typer.Option(help="Default: 10, 1000, 100000.")] = None,
    steps: Annotated[int, typer.Option(help="Decode steps of one round.")] = 32,
    threads: Annotated[int, typer.Option(help="OpenMP threads of each contestant.")] = 1,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = ROOT / "build" / "bench-vllm.json",
) -> None:
    """Two engines, one without Steer's plugin, take turns in one run: `decode` on every shape,
    `distinct`, `peers` and `registry` on the demo model."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the peers' processes too
    batches = batch or [1, 8, 32, SLOTS]
    sizes = names or [10, 1000, 100_000]
    parts = set(part or Part)
    report = Report(
        out, {"rounds": rounds, "steps": steps, "turn": decoding.TURN, "threads": threads}
    )
    for shape_name in shape or ShapeName:
        for mode_name in mode or Mode:
            with _running(shape_name, mode_name, threads) as (pair, folder, model):
                _measure(
                    report, pair, folder, model, shape_name, mode_name, parts,
                    batches=batches, sizes=sizes, rounds=rounds, steps=steps,
                )  # fmt: skip


def _measure(
    report: Report,
    pair: Pair,
    folder: Path,
    model: Path,
    name: str,
    mode: str,
    parts: set[Part],
    *,
    batches: list[int],
    sizes: list[int],
    rounds: int,
    steps: int,
) -> None:
    shape, registry = SHAPES[name], folder / "registry"
    if "decode" in parts:
        diets = (*DIETS, TRIGGERED)
        found = decoding.measure(pair, shape, diets, batches, rounds=rounds, steps=steps)
        decoding.tell(report, f"Decoding: {name}, {mode}", mode, diets, found)
        decoding.tell_overhead(report, shape, mode, registry, batches, found)
        decoding.tell_taps(report, shape, mode, batches, found)
    if "distinct" in parts:
        decoding.tell_distinct(report, pair, shape, mode, rounds=rounds, steps=steps)
    if shape.path is None:
        return
    if "peers" in parts:
        chats.against_peers(
            report, pair, shape, mode, model=model, registry=registry, rounds=min(rounds, 5)
        )
    if "registry" in parts:
        chats.against_registry(
            report,
            pair,
            shape,
            mode,
            model=model,
            folder=folder,
            sizes=sizes,
            rounds=min(rounds, 5),
        )


@contextlib.contextmanager
def _running(shape: str, mode: str, threads: int) -> Iterator[tuple[Pair, Path, Path]]:
    """The two engines, the folder of everything that is written, and the model's folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Registry.open(folder / "registry") as registry:
            register(registry, SHAPES[shape])
        model = SHAPES[shape].model(folder)
        with Pair(
            model, folder / "registry", folder, eager=mode == "eager", threads=threads
        ) as pair:
            yield pair, folder, model
