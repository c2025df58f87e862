"""Decode steps of an engine with Steer against those of a plain one, and where the time goes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.vllm.diets import DIETS, DISTINCT_COUNTS, NOTHING, TRIGGERED, Diet, distinct
from benchmarks.vllm.overhead import step_cost, tap_costs
from benchmarks.vllm.pair import Pair, Paired, spread
from benchmarks.vllm.report import Report, micro, percent, verdict
from benchmarks.vllm.shapes import CAPABILITIES, SLOTS, Shape
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry
from steer.spec import parse_spec

Found = Mapping[tuple[str, int], Sequence[Paired]]
"""Rounds by diet and batch."""

TURN = 4
_COLUMNS = (
    "batch",
    "diet",
    "plain, ms a step",
    "Steer, ms a step",
    "tokens/s",
    "extra",
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
) -> dict[tuple[str, int], list[Paired]]:
    """Every diet at every batch size, once a round, after a round that does not count."""
    found: dict[tuple[str, int], list[Paired]] = {}
    cases = [(diet, batch) for batch in batches for diet in diets]
    for number in tqdm(range(rounds + 1), desc=f"decoding {shape.name}", leave=False):
        # Every other round runs backwards: nobody always follows the same neighbour.
        for diet, batch in cases if number % 2 else reversed(cases):
            one = pair.decode(diet.batch(shape, batch), steps=steps, turn=TURN)
            if number:
                found.setdefault((diet.name, batch), []).append(one)
    return {(d.name, b): found[d.name, b] for d, b in cases}


def tell(report: Report, title: str, mode: str, diets: Sequence[Diet], found: Found) -> None:
    """One row for each case."""
    aims = {diet.name: diet.aims.get(mode) for diet in diets}
    rows, data = [], []
    for (name, batch), rounds in found.items():
        plain, steer = [one.plain for one in rounds], [one.steer for one in rounds]
        ratios = [one.ratio for one in rounds]
        aim = aims[name]
        judged = verdict(ratios, None if aim is None else 1 + aim)
        rows.append(
            (
                str(batch),
                name,
                _ms(plain),
                _ms(steer),
                f"{batch / statistics.median(steer):,.0f}",
                percent(ratios),
                "" if aim is None else f"≤ {100 * aim:+.1f} %",
                judged,
            )
        )
        data.append(
            {
                "batch": batch,
                "diet": name,
                "plain_seconds": plain,
                "steer_seconds": steer,
                "ratios": ratios,
                "prompt_ratios": [one.start_ratio for one in rounds],
                "aim": aim,
                "verdict": judged,
            }
        )
    report.table(title, _COLUMNS, rows, data)


def tell_overhead(
    report: Report, shape: Shape, mode: str, registry: Path, batches: Sequence[int], found: Found
) -> None:
    """Steer's own work in a step, and its share of the plain step that was measured."""
    compiled = mode == "compiled"
    rows, data = [], []
    with Registry.open(registry) as library:
        plans = PlanCache(library, shape.info(), CAPABILITIES)
        for batch in batches:
            rounds = found[NOTHING.name, batch]
            plain = statistics.median(one.plain for one in rounds)
            for diet in (*DIETS, TRIGGERED):
                wanted = diet.batch(shape, batch)
                cost = step_cost(
                    shape,
                    [None if spec is None else plans.plan(parse_spec(spec)) for spec in wanted],
                    compiled=compiled,
                )
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
    report.table(
        f"Steer's own work in a step, without the model: {shape.name}, {mode}",
        (*head, "aim", "verdict"),
        rows,
        data,
    )


def tell_taps(
    report: Report, shape: Shape, mode: str, batches: Sequence[int], found: Found
) -> None:
    """What the taps cost where nothing is steered."""
    rows, data = [], []
    count = 2 * shape.layers + 1
    for batch, one in zip(batches, tap_costs(shape, batches), strict=True):
        plain = statistics.median(each.plain for each in found[NOTHING.name, batch])
        seconds = one.compiled if mode == "compiled" else one.eager
        share = count * seconds / plain
        rows.append((str(batch), micro(seconds), micro(count * seconds), f"{100 * share:.2f} %"))
        data.append({"batch": batch, "seconds": seconds, "taps": count, "share": share})
    title = f"Taps at which nothing runs: {shape.name}, {mode}"
    report.table(title, ("batch", "one tap, µs", f"all {count}, µs", "share of a step"), rows, data)


def tell_distinct(
    report: Report, pair: Pair, shape: Shape, mode: str, *, rounds: int, steps: int
) -> None:
    """A full batch against the number of distinct specs in it."""

    def diet(count: int) -> Diet:
        return Diet(
            f"{count} distinct vectors, one layer",
            lambda s, b: distinct(s, b, count),
            NOTHING.aims if mode == "compiled" else {},
        )

    diets = [diet(count) for count in DISTINCT_COUNTS]
    found = measure(pair, shape, diets, [SLOTS], rounds=rounds, steps=steps)
    tell(report, f"Distinct specs in a batch: {shape.name}, {mode}", mode, diets, found)


def _ms(seconds: Sequence[float]) -> str:
    middle, low, high = (1e3 * value for value in spread(seconds))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"
