"""`python -m benchmarks gpu`: what is to be known of a GPU, in the order in which it matters."""

from __future__ import annotations

import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.child import ROOT
from benchmarks.gpu.cases import Part, results, run_cases
from benchmarks.gpu.device import Device, NoDevice, device
from benchmarks.kept import Kept
from benchmarks.machine import machine, sources
from benchmarks.vllm.shapes import SHAPES, Shape

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "vllm")
_GRACE = 90.0
"""Seconds that a command of vLLM's may run on when no case is begun any more."""


class Name(StrEnum):
    KERNEL = "kernel"
    LAYER = "layer"
    ENGINE = "engine"
    VLLM = "vllm"


def main(
    names: Annotated[
        list[Name] | None, typer.Argument(help="Default: kernel, layer, engine, vllm.")
    ] = None,
    limit_minutes: Annotated[
        float, typer.Option(help="Begins no case later; run it again for the rest.")
    ] = 8.0,
    model: Annotated[
        str | None, typer.Option(help="SmolLM2's folder or GGUF file, where it was brought.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="Where vLLM and its torch were unpacked to.")
    ] = None,
    device_name: Annotated[str, typer.Option("--device", help="cuda, or cpu to try it.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="Sizes for trying it.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = ROOT / "build" / "bench-gpu.json",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with the file.")] = False,
) -> None:
    """Runs the cases that have no result yet, and prints a table of each part. Every case is kept
    when it is done, so that the same command goes on where it was cut off."""
    try:
        chosen = device(device_name)
        here = {
            **machine(PACKAGES),
            **chosen.machine(),
            "sources": sources("steer", "benchmarks"),
        }
        kept = Kept.at(out, {"small": small}, here, fresh=fresh)
    except (NoDevice, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(width=150)
    console.print(kept.machine)
    until = time.monotonic() + 60 * limit_minutes
    for one in names or Name:
        part = _part(one, chosen, model, site, out.parent, small=small, until=until)
        missing = part.missing()
        if missing is not None:
            console.print(f"{one}: {missing}")
            continue
        left = until - time.monotonic()
        progress = run_cases(kept, part.cases(), chosen, limit_seconds=left)
        part.table(results(kept, one)).show(console)
        console.print(
            f"{one}: {progress.done} cases done, {progress.failed} failed, {progress.left} left"
            + (": run the same command again" if progress.left else "")
        )


def _part(
    name: Name,
    chosen: Device,
    model: str | None,
    site: Path | None,
    folder: Path,
    *,
    small: bool,
    until: float,
) -> Part:
    """A part imports what it needs and no more: kernels are measured where there is neither
    transformers nor a registry."""
    if name is Name.KERNEL:
        from benchmarks.gpu.kernel import Kernels  # noqa: PLC0415

        return Kernels(_shape(small), chosen, requests=8 if small else 256)
    if name is Name.LAYER:
        from benchmarks.gpu.share import Shares, Sizes  # noqa: PLC0415

        sizes = Sizes((1, 4), (1, 4), 8, rounds=1, work=0.0) if small else Sizes()
        return Shares(_shape(small), chosen, sizes)
    if name is Name.ENGINE:
        from benchmarks.gpu.engine import Engines, Work  # noqa: PLC0415

        work = Work(4, 8, 4, rounds=1, compared=4, shallow=4) if small else Work()
        return Engines(_shape(small) if small else SHAPES["8b"], chosen, work, model)
    from benchmarks.gpu.on_vllm import Commands  # noqa: PLC0415

    return Commands(site, folder, until=until + _GRACE)


def _shape(small: bool) -> Shape:
    """A decoder of 8B parameters, of which one layer is computed and few are steered."""
    if small:
        return Shape("small", d_model=32, layers=4, heads=4, ffn=64, vocabulary=64, kv_heads=2)
    return replace(SHAPES["8b"], layers=4)
