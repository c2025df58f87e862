"""Decode steps of an engine with Steer against those of a plain one, and where the time goes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.intervals import verdict
from benchmarks.vllm.diets import (
    CONTROL,
    DIETS,
    DISTINCT_COUNTS,
    NOTHING,
    READING,
    Diet,
    distinct,
)
from benchmarks.vllm.overhead import StepAlone, planned, step_cost, tap_costs
from benchmarks.vllm.pair import Pair
from benchmarks.vllm.report import Table, micro, milliseconds, percent, starts_percent
from benchmarks.vllm.shapes import CAPABILITIES, Shape
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry

Start = list[dict[str, Any]]
"""What one start of the engines gave: a diet, a batch size, and the rounds (`Paired`)."""

TURN = 4
ALL = (CONTROL, *DIETS)
READ = (CONTROL, NOTHING, *READING)
_COLUMNS = (
    "batch",
    "diet",
    "plain, ms a step",
    "the other, ms a step",
    "tokens/s",
    "extra",
    "start by start",
    "aim",
    "",
)


def measure(
    pair: Pair,
    shape: Shape,
    diets: Sequence[Diet],
    batches: Sequence[int],
    *,
    rounds: int,
    steps: int,
) -> Start:
    """Every diet at every batch size, once a round, after a round that does not count."""
    cases = [(diet, batch) for batch in batches for diet in diets]
    found: dict[tuple[str, int], list[dict[str, float]]] = {(d.name, b): [] for d, b in cases}
    for number in tqdm(range(rounds + 1), desc=f"decoding {shape.name}", leave=False):
        # Every other round runs backwards: nobody always follows the same neighbour.
        for diet, batch in cases if number % 2 else reversed(cases):
            specs = diet.batch(shape, batch)
            asked = None if diet.inspect is None else diet.inspect(shape)
            one = pair.decode(specs, steps=steps, turn=TURN, control=diet.control, inspect=asked)
            if number:
                found[diet.name, batch].append(asdict(one))
    return [{"diet": name, "batch": b, "rounds": made} for (name, b), made in found.items()]


def distinct_diets(mode: str) -> list[Diet]:
    """A full batch with more and more distinct specs in it."""
    aims = NOTHING.aims if mode == "compiled" else {}

    def diet(count: int) -> Diet:
        name = f"{count} distinct vectors, one layer"
        return Diet(name, lambda s, b: distinct(s, b, count), aims)

    return [diet(count) for count in DISTINCT_COUNTS]


def table(title: str, mode: str, diets: Sequence[Diet], starts: Sequence[Start]) -> Table:
    """One row for each case, over all starts."""
    aims = {diet.name: diet.aims.get(mode) for diet in diets}
    rows = []
    for case in starts[0]:
        name, batch = case["diet"], case["batch"]
        plain, other, ratios = (
            of(starts, name, batch, figure) for figure in ("plain", "other", "ratio")
        )
        aim = aims[name]
        speed = batch / statistics.median(seconds for one in other for seconds in one)
        rows.append(
            (
                str(batch),
                name,
                milliseconds(plain),
                milliseconds(other),
                f"{speed:,.0f}",
                percent(ratios),
                starts_percent(ratios),
                "" if aim is None else f"≤ {100 * aim:+.1f} %",
                verdict(ratios, None if aim is None else 1 + aim),
            )
        )
    return Table(f"{title}, {len(starts)} starts", _COLUMNS, rows)


def of(starts: Sequence[Start], name: str, batch: int, figure: str) -> list[list[float]]:
    """A figure of one case: of each round, start by start."""
    return [
        [one[figure] for one in case["rounds"]]
        for start in starts
        for case in start
        if (case["diet"], case["batch"]) == (name, batch)
    ]


def own_work(
    shape: Shape, mode: str, registry: Path, batches: Sequence[int], starts: Sequence[Start]
) -> Table:
    """Steer's own work in a step, and its share of the plain step that was measured."""
    rows, data = [], []
    with Registry.open(registry) as library:
        plans = PlanCache(library, shape.info(), CAPABILITIES)
        for batch in batches:
            plain = _plain(starts, batch)
            for diet in DIETS:
                asked = planned(plans, diet.batch(shape, batch))
                cost = step_cost(StepAlone(shape, asked, compiled=mode == "compiled"))
                share = cost.total / plain
                parts = (cost.begin, cost.taps, cost.end, cost.total)
                aim = diet.aims.get(mode)
                rows.append(
                    (
                        str(batch),
                        diet.name,
                        *map(micro, parts),
                        f"{100 * share:.2f} %",
                        "" if aim is None else f"≤ {100 * aim:.1f} %",
                        "" if aim is None else "met" if share <= aim else "not met",
                    )
                )
                data.append({"batch": batch, "diet": diet.name, "seconds": parts, "share": share})
    head = ("batch", "diet", "before, µs", "at the taps, µs", "after, µs", "all, µs", "share")
    title = f"Steer's own work in a step, without the model: {shape.name}, {mode}"
    return Table(title, (*head, "aim", "verdict"), rows, data)


def idle_taps(
    shape: Shape, mode: str, batches: Sequence[int], starts: Sequence[Start]
) -> Table:  # fmt: skip
    """What the taps cost where nothing is steered."""
    rows, data = [], []
    count = 2 * shape.layers + 1
    for batch, one in zip(batches, tap_costs(shape, batches), strict=True):
        seconds = one.compiled if mode == "compiled" else one.eager
        share = count * seconds / _plain(starts, batch)
        rows.append((str(batch), micro(seconds), micro(count * seconds), f"{100 * share:.2f} %"))
        data.append({"batch": batch, "seconds": seconds, "taps": count, "share": share})
    title = f"Taps at which nothing runs: {shape.name}, {mode}"
    columns = ("batch", "one tap, µs", f"all {count}, µs", "share of a step")
    return Table(title, columns, rows, data)


def _plain(starts: Sequence[Start], batch: int) -> float:
    """The plain engine's step beside one that steers nothing, in seconds."""
    rounds = of(starts, NOTHING.name, batch, "plain")
    return statistics.median(seconds for one in rounds for seconds in one)
