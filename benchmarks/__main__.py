"""Runs the benchmarks and prints one table each: `python -m benchmarks [--rounds N] [NAME …]`.

Four have options of their own: `python -m benchmarks vllm` and `python -m benchmarks vllm
readouts`, which run in vLLM's environment, `python -m benchmarks smollm2`, which runs everybody
side by side on a real model, and `python -m benchmarks gpu`, which runs on a host with one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

SUITES = {
    **{name: f"benchmarks.{name}" for name in ("engine", "attach", "peers", "upload", "jobs")},
    "saes": "benchmarks.saes.clamps",
}
OWN = {
    "vllm": "benchmarks.vllm.command",
    "vllm readouts": "benchmarks.vllm.readouts.command",
    "smollm2": "benchmarks.smollm2.command",
    "gpu": "benchmarks.gpu.command",
}
"""Modules are imported when they are run: a host with a GPU need not have what the others need."""
PLAIN = ("measured", "tokens/s", "ratio", "aim")


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(SUITES)}.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds of each contestant.")] = 7,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
) -> None:
    """Medians over interleaved rounds; the range in brackets. `vllm`, `smollm2` or `gpu`, as the
    first argument, runs the benchmarks of the vLLM engine, of a real model, or of a GPU."""
    from benchmarks.timing import machine  # noqa: PLC0415

    unknown = set(names or ()) - set(SUITES)
    if unknown:
        raise typer.BadParameter(
            f"there is no {', '.join(sorted(unknown))!r}: choose any of {', '.join(SUITES)}"
        )
    torch.set_num_threads(threads)
    console = Console(width=120)
    console.print(machine())
    for name in names or SUITES:
        suite = import_module(SUITES[name])
        table = Table(*getattr(suite, "HEADINGS", PLAIN), title=name)
        for row in suite.run(min(rounds, 3) if name == "peers" else rounds):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    words = next((n for n in (2, 1) if " ".join(sys.argv[1 : 1 + n]) in OWN), 0)
    if words:
        command = import_module(OWN[" ".join(sys.argv[1 : 1 + words])])
        del sys.argv[1 : 1 + words]
        typer.run(command.main)
    else:
        typer.run(main)
