"""`python -m benchmarks vllm readouts`: in the environment of `make vllm`, on an idle machine."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.child import ROOT
from benchmarks.kept import Kept
from benchmarks.machine import machine, sources
from benchmarks.vllm.pair import Settings
from benchmarks.vllm.readouts import measuring
from benchmarks.vllm.report import PACKAGES
from benchmarks.vllm.shapes import SHAPES, Shape
from steer.engines.transformers.checkpoints.shipped import add_shipped
from steer.registry.registry import Registry

_SHIPPED_AS = {"smollm2": "smollm2", "demo": "steer-demo"}


class ShapeName(StrEnum):
    SMOLLM2 = "smollm2"
    DEMO = "demo"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Each has every arm twice.")] = 8,
    shape: Annotated[list[ShapeName] | None, typer.Option(help="Default: smollm2.")] = None,
    chats: Annotated[int, typer.Option(min=1, help="Of a job, all at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 32,
    threads: Annotated[int, typer.Option(help="OpenMP threads of each server.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of both servers.")] = "float32",
    eager: Annotated[bool, typer.Option("--eager", help="vLLM without compilation.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = (
        ROOT / "build" / "bench-readouts.json"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with the file.")] = False,
) -> None:
    """What requests pay for read-outs: a plain server and one with Steer get the same chats, asked
    for nothing, projections, features, a lens and norms in turn. A run that was cut off goes on
    where it was, with servers started anew."""
    torch.set_num_threads(threads)
    # However it is ended, the servers that it started are.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    here = {**machine(PACKAGES), "sources": sources("steer", "steer_server", "benchmarks")}
    asked = {
        "chats": chats, "tokens": tokens, "threads": threads, "dtype": dtype, "eager": eager,
    }  # fmt: skip
    try:
        kept = Kept.at(out, asked, here, fresh=fresh)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(width=150)
    console.print(kept.machine)
    settings = Settings(eager, threads, dtype)
    names = shape or [ShapeName.SMOLLM2]
    for name in names:
        _measure(kept, SHAPES[name], settings, rounds=rounds, chats=chats, tokens=tokens)
    for name in names:
        found = kept.below(name)[:rounds]
        measuring.table(SHAPES[name], found, chats=chats, tokens=tokens).show(console)
    console.print(f"kept in {out}")


def _measure(
    kept: Kept, shape: Shape, settings: Settings, *, rounds: int, chats: int, tokens: int
) -> None:
    """The rounds that are missing, each kept as soon as it is measured."""
    first = len(kept.below(shape.name))
    if first >= rounds:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Registry.open(folder / "registry") as registry:
            add_shipped(registry, _SHIPPED_AS[shape.name])
        measuring.measure(
            shape, shape.model(folder), folder / "registry", folder, settings,
            first=first, rounds=rounds, chats=chats, tokens=tokens,
            keep=lambda number, seconds: kept.keep(f"{shape.name}/{number}", seconds),
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
