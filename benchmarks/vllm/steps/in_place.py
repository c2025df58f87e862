"""Where the time of a decode step goes, inside of an engine: `python -m
benchmarks.vllm.steps.in_place`.

One engine with Steer decodes what every diet asks for, in turns, with timers around its forward
pass and around Steer's own parts: what they take in place, with caches that the model has emptied,
beside what they take alone (`overhead.StepAlone`). Timers add about a microsecond each.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.vllm.diets import DIETS, Diet
from benchmarks.vllm.pair import ENVIRONMENT, prompts_of
from benchmarks.vllm.report import Table, micro
from benchmarks.vllm.shapes import SHAPES, Shape, register
from steer.registry.registry import Registry

WARM = 2
"""Steps of each turn that do not count."""
PARTS = ("forward", "begin", "visit", "end", "look")

Seconds = dict[str, list[float]]


def main(
    shape: str = "100m",
    batch: int = 32,
    rounds: int = 6,
    steps: Annotated[int, typer.Option(help="Decode steps of a turn.")] = 12,
    diet: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
) -> None:
    """Microseconds of a step, medians over the rounds: all of it, the forward pass without Steer's
    taps, and Steer's parts before, in and after it, and at its logits."""
    one = SHAPES[shape]
    diets = [known for known in DIETS if not diet or known.name in diet]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with Registry.open(folder / "registry") as library:
            register(library, one)
        os.environ |= ENVIRONMENT | {
            "OMP_NUM_THREADS": "1",
            "VLLM_PLUGINS": "steer",
            "STEER_REGISTRY": str(folder / "registry"),
        }
        found = _measured(one, one.model(folder), diets, batch, rounds, steps)
    rows = [
        (name, *(micro(statistics.median(each)) for each in zip(*turns, strict=True)))
        for name, turns in found.items()
    ]
    head = ("diet", "step, µs", "forward without taps", "before", "at the taps", "after", "logits")
    title = f"A decode step of {batch} requests in place: {shape}, compiled"
    Table(title, head, rows).show(Console(width=120))


def _measured(
    shape: Shape, model: Path, diets: list[Diet], batch: int, rounds: int, steps: int
) -> dict[str, list[tuple[float, ...]]]:
    """For each diet and round the median step, and its parts, in seconds."""
    from benchmarks.vllm.worker import Engine  # noqa: PLC0415 -- vLLM reads the environment

    seconds: Seconds = defaultdict(list)
    _put_timers(seconds)
    engine = Engine(str(model), steered=True, eager=False)
    prompts = prompts_of(batch)
    found: dict[str, list[tuple[float, ...]]] = {one.name: [] for one in diets}
    for number in range(rounds + 1):
        for one in diets if number % 2 else reversed(diets):
            engine.start(one.batch(shape, batch), prompts, WARM + steps + 4)
            engine.steps(WARM)
            seconds.clear()
            taken = statistics.median(engine.steps(steps))
            forward, begin, visit, end, look = (sum(seconds[part]) / steps for part in PARTS)
            engine.finish()
            if number:  # the first round compiles
                found[one.name].append((taken, forward - visit, begin, visit, end, look))
    return found


def _put_timers(seconds: Seconds) -> None:
    from steer.engines.vllm.taps.forward_pass import ForwardPass  # noqa: PLC0415
    from steer.engines.vllm.worker.runner_v1 import RunnerV1  # noqa: PLC0415
    from steer.engines.vllm.worker.steering import WorkerSteering  # noqa: PLC0415

    for owner, name in (
        (WorkerSteering, "begin"),
        (WorkerSteering, "end"),
        (WorkerSteering, "look"),
        (ForwardPass, "visit"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), seconds, name))
    start: Any = RunnerV1.__init__

    def started(self: Any, *given: Any) -> None:
        start(self, *given)
        self._forward = _timed(self._forward, seconds, "forward")

    RunnerV1.__init__ = started  # type: ignore[method-assign, assignment]


def _timed(work: Callable[..., Any], seconds: Seconds, name: str) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            seconds[name].append(time.perf_counter() - started)

    return timed


if __name__ == "__main__":
    typer.run(main)
