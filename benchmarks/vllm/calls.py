"""`python -m benchmarks.vllm.calls`: what a request and a decode step cost in calls, not seconds.

A whole job (plans, tickets, generation, receipts) of requests that were all seen before is run in
one process under a profiler that counts the calls of Python functions and, from them, of compiled
ones (torch operations among these). The counts are the same in every run, on a machine however
busy; what a step costs is the difference between two lengths of the same job. They say where
Python is spent, not how long anything takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.child import ROOT, Child
from benchmarks.vllm.diets import DIETS, NOTHING, Diet
from benchmarks.vllm.pair import Settings, child, prompts_of
from benchmarks.vllm.shapes import SHAPES, Shape, register
from steer.registry.registry import Registry

REQUESTS = 16
SHORT, LONG = 8, 40
"""Tokens of each request in the two jobs whose difference is what a step costs."""

WATCHED = {
    "steer/engines/vllm/ticket.py:_read": "tickets parsed",
    "steer/plan/file.py:selection_from_json": "selections parsed",
    "steer/registry/catalogue/catalogue.py:Catalogue.state": "asked for the state of the catalogue",
    "steer/registry/registry.py:Registry.entry": "names looked up",
    "steer/spec.py:SteeringSpec._fingerprint": "specs serialised",
    "steer/spec.py:parse_spec": "specs parsed",
}
_CONTESTANTS = {one.name: one for one in DIETS}
_CHOSEN = ("one shared vector, every layer", "all kinds mixed")


class Calls:
    """The calls counted so far, of functions of Steer (by file and name) and of all."""

    def __init__(self) -> None:
        self.python = self.compiled = self.steer = 0
        self._codes: Counter[CodeType] = Counter()

    def take(self, frame: FrameType, event: str, _: object) -> None:
        """A profile function (`sys.setprofile`)."""
        if event == "call":
            self.python += 1
            self._codes[frame.f_code] += 1
        elif event == "c_call":
            self.compiled += 1

    def as_json(self) -> dict[str, Any]:
        named: Counter[str] = Counter()
        for code, count in self._codes.items():
            _, inside, file = code.co_filename.rpartition("/steer/")
            if inside and "site-packages" not in code.co_filename:
                named[f"steer/{file}:{code.co_qualname}"] += count
        return {
            "python": self.python,
            "compiled": self.compiled,
            "steer": sum(named.values()),
            "by function": dict(named),
        }


@contextmanager
def counted(calls: Calls) -> Iterator[None]:
    """Counts the calls of this thread into `calls`."""
    sys.setprofile(calls.take)
    try:
        yield
    finally:
        sys.setprofile(None)


def main(
    shape: str = "demo", compiled: bool = False, top: int = 0, out: Path | None = None
) -> None:
    """Counts plain vLLM, Steer with nothing steered, one vector, and all kinds; `--top N` lists
    Steer's most called functions, `--out` writes all of it as JSON."""
    console, sizes = Console(width=120), SHAPES[shape]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Registry.open(folder / "registry") as registry:
            register(registry, sizes)
        for steered in (False, True):
            engine = child(
                sizes.model(folder), folder / "registry", ROOT / "build" / f"calls-{steered}.log",
                Settings(eager=not compiled), steered=steered,
            )  # fmt: skip
            try:
                engine.wait()
                diets = [NOTHING, *(_CONTESTANTS[one] for one in _CHOSEN)] if steered else [NOTHING]
                for diet in diets:
                    who = diet.name if steered else "plain vLLM"
                    found[who] = _measured(engine, sizes, diet)
            finally:
                engine.close()
    _tell(console, found, top)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


def _measured(engine: Child, shape: Shape, diet: Diet) -> dict[str, Any]:
    """The calls of a step, and those of a request beside its steps."""
    order = {
        "specs": diet.batch(shape, REQUESTS),
        "prompts": prompts_of(REQUESTS),
    }
    engine.do("chats", tokens=LONG, **order)  # compiles and loads what is kept
    short, long = (engine.do("counted", tokens=count, **order) for count in (SHORT, LONG))
    names = set(short["by function"]) | set(long["by function"])
    by = {
        name: _split(short["by function"].get(name, 0), long["by function"].get(name, 0))
        for name in names
    }
    kinds = {kind: _split(short[kind], long[kind]) for kind in ("python", "compiled", "steer")}
    return {**kinds, "by function": by}


def _split(short: int, long: int) -> dict[str, float]:
    step = (long - short) / (LONG - SHORT)
    return {"step": step, "request": (short - SHORT * step) / REQUESTS}


def _tell(console: Console, found: dict[str, dict[str, Any]], top: int) -> None:
    for per in ("request", "step"):
        table = Table("who", "Python calls", "compiled calls", "of Steer's functions", *(
            WATCHED.values() if per == "request" else ()
        ), title=f"per {per} ({REQUESTS} requests)")  # fmt: skip
        for who, one in found.items():
            cells = [f"{one[kind][per]:.1f}" for kind in ("python", "compiled", "steer")]
            if per == "request":
                cells += [f"{one['by function'].get(name, {}).get(per, 0):.1f}" for name in WATCHED]
            table.add_row(who, *cells)
        console.print(table)
        for who, one in found.items() if top else ():
            ranked = sorted(one["by function"].items(), key=lambda item: -item[1][per])[:top]
            for name, count in ranked:
                console.print(f"{who}  per {per}  {count[per]:8.1f}  {name}")


if __name__ == "__main__":
    typer.run(main)
