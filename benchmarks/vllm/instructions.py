"""`python -m benchmarks.vllm.instructions`: what Steer does in a decode step, in instructions.

Steer's own work in a step, without the model (`overhead.StepAlone`), under valgrind's callgrind,
which counts what the processor executes: a number that no neighbour and no clock moves. vLLM itself
does not run there in reasonable time, so this says what Steer's part is and how it changes, not its
share. Needs valgrind and a C compiler (Debian: `valgrind`, `gcc`): counting is switched on and off
by a library of four lines, so that imports run uncounted.

With `--cold` it also counts what has to come from memory, in lines of 64 bytes: once with caches
that are empty when a step begins, which is all that it touches, and once when every tap does, which
is how a layer of a model leaves them, whose weights are larger than they are.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console

from benchmarks.child import ROOT
from benchmarks.vllm.diets import DIETS
from benchmarks.vllm.overhead import StepAlone, planned
from benchmarks.vllm.report import Table
from benchmarks.vllm.shapes import CAPABILITIES, SHAPES, library
from steer.plan.cache import PlanCache

STEPS, COLD_STEPS, WARM = 8, 2, 16
"""Steps that are counted, after those in which caches fill. To empty the caches takes seconds."""
_SWITCH = r"""
#include <valgrind/callgrind.h>
void resume(void) { CALLGRIND_START_INSTRUMENTATION; }
void pause_(void) { CALLGRIND_STOP_INSTRUMENTATION; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
_WORKER = "--worker"
LINES = "lines from memory"
_MISSES = ("ILmr", "DLmr", "DLmw")
"""Of instructions, of numbers read and of numbers written, in the last cache."""
_POSITIONS = "0123456789+-*"
"""What a line with a count begins with: where in the source it was, or how far from the last."""


class Switch(Protocol):
    def resume(self) -> None:
        """Counts from here on."""

    def pause(self) -> None:
        """Counts no further."""

    def dump(self, name: str) -> None:
        """Writes down what was counted, under a name, and begins again at zero."""


def main(
    shape: str = "100m",
    batch: Annotated[list[int] | None, typer.Option(help="Default: 1, 32.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled")] = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Count lines from memory too, caches empty at steps and at taps."
        ),
    ] = False,
    diet: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    top: Annotated[int, typer.Option(help="Functions of each diet to list.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """Counts one step of each diet; the interpreter, torch and the system libraries included."""
    names = [one.name for one in DIETS]
    for name in diet or ():
        if name not in names:
            raise typer.BadParameter(f"{name!r} is none of {names}", param_hint="--diet")
    asked = {"shape": shape, "batches": batch or [1, 32], "compiled": compiled}
    asked |= {"cold": cold, "diets": diet}
    with tempfile.TemporaryDirectory() as folder:
        found = _counted(Path(folder), asked)
    columns = ("instructions", *((LINES,) if cold else ()))
    rows = [
        (str(one["batch"]), one["diet"], *(f"{one[column]:,.0f}" for column in columns))
        for one in found
    ]
    mode = "compiled" if compiled else "eager"
    title = f"Steer's own work in a step: {shape}, {mode}"
    console = Console(width=150)
    Table(title, ("batch", "diet", *columns), rows).show(console)
    for one in found if top else ():
        for function, count in list(one["functions"].items())[:top]:
            console.print(f"{one['batch']:3} {one['diet']}  {count:14,.0f}  {function}")
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


def _counted(folder: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    source, built, profile = folder / "switch.c", folder / "switch.so", folder / "profile"
    source.write_text(_SWITCH)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source], check=True)
        subprocess.run(
            [
                *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"),
                f"--cache-sim={'yes' if asked['cold'] else 'no'}",
                f"--callgrind-out-file={profile}",
                *(sys.executable, "-m", __spec__.name, _WORKER, str(built), json.dumps(asked)),
            ],
            check=True,
            cwd=ROOT,
            # The same hashes, and so the same instructions, in every run.
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
    except FileNotFoundError as error:
        raise typer.BadParameter(f"{error.filename} is missing: apt install valgrind gcc") from None
    return [read(path) for path in sorted(folder.glob("profile.*"), key=_number) if _named(path)]


def read(path: Path) -> dict[str, Any]:
    """What one dump of callgrind counted, for one step: in all, and by function (its own code)."""
    functions: Counter[str] = Counter()
    names: dict[str, str] = {}
    current, called = "", False
    events, totals = ["Ir"], Counter[str]()
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("fn="):
            current = _name(line[3:], names)
        elif line.startswith("cfn="):
            _name(line[4:], names)
        elif line.startswith("calls="):
            called = True  # the next line is what is called, which has lines of its own
        elif line[:1] and line[0] in _POSITIONS:
            if not called:
                functions[current] += int(line.split()[1])
            called = False
        elif line.startswith("events:"):
            events = line.split()[1:]
        elif line.startswith(("summary:", "totals:")):
            # Trailing zeros are left out.
            totals = Counter(dict(zip(events, map(int, line.split()[1:]), strict=False)))
    described = json.loads(_named(path) or "{}")
    steps = described.pop("steps")
    return {
        **described,
        "instructions": totals["Ir"] / steps,
        LINES: sum(totals[event] for event in _MISSES) / steps,
        "functions": {name: count / steps for name, count in functions.most_common(200)},
    }


def _name(field: str, names: dict[str, str]) -> str:
    """A name, which is written out once and then called by its number: `(3) PyObject_Call`."""
    number, _, name = field.partition(" ")
    if name:
        names[number] = re.sub(r"'\d+$", "", name)  # a call from within itself has a name too
    return names.get(number, field)


def _named(path: Path) -> str | None:
    """The name under which a dump was written; None of the one that a process leaves at its end."""
    found = re.search(
        r"^desc: Trigger: Client Request: (.*)$", path.read_text(errors="replace"), re.M
    )
    return found[1] if found else None


def _number(path: Path) -> int:
    return int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0


# Under valgrind


class _Callgrind:
    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def resume(self) -> None:
        self._library.resume()

    def pause(self) -> None:
        self._library.pause_()

    def dump(self, name: str) -> None:
        self._library.dump(name.encode())


@torch.inference_mode()
def count(switch: Switch, asked: dict[str, Any]) -> None:
    """`STEPS` steps of every diet at every batch size, between `resume` and `pause`."""
    torch.set_num_threads(1)
    shape = SHAPES[asked["shape"]]
    plans = PlanCache(library(shape), shape.info(), CAPABILITIES)
    diets = [one for one in DIETS if one.name in (asked["diets"] or [one.name])]
    for batch in asked["batches"]:
        for diet in diets:
            wanted = planned(plans, diet.batch(shape, batch))
            told = {"batch": batch, "diet": diet.name, "steps": STEPS}
            between = _Between(switch) if asked["cold"] else None
            alone = StepAlone(shape, wanted, compiled=asked["compiled"], between=between)
            alone.begin()
            _count_steps(switch, alone, WARM, STEPS)
            switch.dump(json.dumps(told))
            if between is not None:
                between.empties = True
                _count_steps(switch, alone, 0, COLD_STEPS)
                told |= {"diet": f"{diet.name}, empty at taps", "steps": COLD_STEPS}
                switch.dump(json.dumps(told))
            alone.check()


def _count_steps(switch: Switch, alone: StepAlone, warm: int, counted: int) -> None:
    for number in range(warm + counted):
        alone.prepare()
        if number >= warm:
            switch.resume()
        alone.step()
        switch.pause()


class _Between:
    """Empties callgrind's caches before a tap, if it is told to: whenever counting begins, they
    are."""

    def __init__(self, switch: Switch) -> None:
        self._switch, self.empties = switch, False

    def __call__(self) -> None:
        if self.empties:
            self._switch.pause()
            self._switch.resume()


if __name__ == "__main__":
    if sys.argv[1:2] == [_WORKER]:
        count(_Callgrind(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        typer.run(main)
