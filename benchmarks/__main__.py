"""Runs the benchmarks and prints one table each: `python -m benchmarks [--rounds N] [NAME …]`.

Two have options of their own: `python -m benchmarks vllm`, which runs in vLLM's environment, and
`python -m benchmarks smollm2`, which runs everybody side by side on a real model.
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import attach, engine, jobs, peers, upload
from benchmarks.timing import machine

SUITES = {
    "engine": engine.run,
    "attach": attach.run,
    "peers": peers.run,
    "upload": upload.run,
    "jobs": jobs.run,
}
PLAIN = ("measured", "tokens/s", "ratio", "aim")
HEADINGS = {"jobs": jobs.HEADINGS, "upload": ("measured", "milliseconds", "ratio", "aim")}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(SUITES)}.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds of each contestant.")] = 7,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
) -> None:
    """Medians over interleaved rounds; the range in brackets. `vllm` or `smollm2`, as the first
    argument, runs the benchmarks of the vLLM engine, or of a real model."""
    torch.set_num_threads(threads)
    console = Console(width=120)
    console.print(machine())
    for name in names or list(SUITES):
        table = Table(*HEADINGS.get(name, PLAIN), title=name)
        for row in SUITES[name](min(rounds, 3) if name == "peers" else rounds):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["vllm"]:
        from benchmarks.vllm import command

        del sys.argv[1]
        typer.run(command.main)
    elif sys.argv[1:2] == ["smollm2"]:
        from benchmarks.smollm2 import command as smollm2

        del sys.argv[1]
        typer.run(smollm2.main)
    else:
        typer.run(main)
