"""The same chats, all at once, to a plain server and to one with Steer, asked for read-outs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from benchmarks.intervals import verdict
from benchmarks.vllm import serving
from benchmarks.vllm.pair import Settings
from benchmarks.vllm.readouts.arms import NOTHING, PLAIN, Arm, arms
from benchmarks.vllm.report import Table, percent, rate
from benchmarks.vllm.shapes import Shape

Seconds = dict[str, float]
"""A round: for each arm the seconds of its two jobs together."""


def measure(
    shape: Shape,
    model: Path,
    registry: Path,
    folder: Path,
    settings: Settings,
    *,
    first: int,
    rounds: int,
    chats: int,
    tokens: int,
    keep: Callable[[int, Seconds], None],
) -> None:
    """Starts both servers and gives each round from `first` to before `rounds` to `keep`, after a
    job of every arm that does not count."""
    asked, found = serving.messages(chats), arms(shape)
    with ExitStack() as stack:
        plain, steer = (
            serving.started(stack, shape, model, registry, folder, settings, chats, steered=steered)
            for steered in (False, True)
        )

        said: list[str] = []

        def seconds(arm: Arm) -> float:
            bodies = [arm.body(chat, serving.NAME, tokens) for chat in asked]
            taken, answers = (plain if arm.plain else steer).ask(bodies)
            for answer in answers:
                arm.check(answer, tokens)
            texts = [answer["choices"][0]["message"]["content"] for answer in answers]
            if not said:
                said.extend(texts)
            # Which rows share a step changes the last bits of a sum, and now and then a token.
            same = sum(one == other for one, other in zip(texts, said, strict=True))
            if same < len(said) / 2:
                raise RuntimeError(f"{arm.name}: {same} of {len(said)} answers are the first's")
            return taken

        for arm in tqdm(found, desc=f"warming up {shape.name}", leave=False):
            seconds(arm)
        for number in tqdm(range(first, rounds), desc=f"reading {shape.name}", leave=False):
            total = dict.fromkeys((arm.name for arm in found), 0.0)
            # There and back again: what drifts within a round weighs on all arms alike.
            for arm in (*found, *reversed(found)):
                total[arm.name] += seconds(arm)
            keep(number, total)


def table(shape: Shape, rounds: Sequence[Seconds], *, chats: int, tokens: int) -> Table:
    """A row for each arm: what it costs over the chats that ask for nothing, and over plain
    vLLM."""
    rows = []
    made = 2 * chats * tokens
    for arm in arms(shape):
        times = [one[arm.name] for one in rounds]
        over = {
            base: [[t / one[base] for t, one in zip(times, rounds, strict=True)]]
            for base in (NOTHING, PLAIN)
        }
        aim = None if arm.aim is None else 1 + arm.aim
        rows.append(
            (
                arm.name,
                rate([made / t for t in times]),
                *("" if arm.name == base else percent(over[base]) for base in (NOTHING, PLAIN)),
                "" if arm.aim is None else f"≤ +{100 * arm.aim:g} %",
                verdict(over[NOTHING], aim),
            )
        )
    title = f"Read-outs of {chats} chats × {tokens} tokens over HTTP: {shape.name}"
    columns = ("asked", "tokens/s", "over nothing", "over plain vLLM", "aim", "")
    return Table(f"{title}, {len(rounds)} rounds of two jobs each", columns, rows)
