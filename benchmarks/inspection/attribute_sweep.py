"""A sweep over source layers × target layers, for many subjects, over HTTP: beside the same cells
one by one, and beside chats on the same server."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.inspection.chat_latency import Latency, chats, quantile
from benchmarks.inspection.facts import CAPITAL, COUNTRIES, SOURCE
from benchmarks.inspection.one_by_one import OneByOne
from benchmarks.server import Server
from steer.inspection.patchscopes.method import MAX_CELLS
from steer.prompts import text_tokens

PLACEHOLDER = " x"
_AT_ONCE = 2
"""Sweeps that are asked for at a time, as many as a server runs by default."""

Cell = tuple[int, int, int]
"""A subject's number, the layer that is read, and the layer that its state is put into."""


@dataclass(frozen=True)
class Sweep:
    """What is asked: the subjects' names, the layers on both sides, and how long answers are."""

    subjects: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: int

    @staticmethod
    def of(prompts: int, layers: Sequence[int], tokens: int) -> Sweep:
        names = tuple(one.name for one in COUNTRIES[:prompts])
        if len(names) < prompts:
            raise ValueError(f"there are {len(COUNTRIES)} subjects, and {prompts} are asked for")
        return Sweep(names, tuple(layers), tokens)

    @property
    def cells(self) -> int:
        return len(self.subjects) * len(self.layers) ** 2

    def bodies(self) -> list[tuple[int, dict[str, Any]]]:
        """The requests, each of as many source layers as the route allows, with its subject."""
        step = max(1, MAX_CELLS // len(self.layers))
        return [
            (
                number,
                {
                    "source": {"text": SOURCE.format(name)},
                    "positions": [-1],
                    "layers": list(self.layers[first : first + step]),
                    "preset": "custom",
                    "target": {
                        "text": CAPITAL.format(PLACEHOLDER.strip()),
                        "placeholder": PLACEHOLDER,
                    },
                    "target_layers": list(self.layers),
                    "max_tokens": 0 if self.tokens == 1 else self.tokens,
                    "top": 1,
                    "controls": [],
                },
            )
            for number, name in enumerate(self.subjects)
            for first in range(0, len(self.layers), step)
        ]


@dataclass(frozen=True)
class Said:
    """What a cell says: its first token, and the whole answer where it has more."""

    token: int
    text: str | None = None


async def swept(
    http: httpx.AsyncClient, sweep: Sweep, done: Callable[[int], None]
) -> dict[Cell, Said]:
    """All cells, as the server answers them."""
    found: dict[Cell, Said] = {}
    waiting = iter(sweep.bodies())

    async def ask() -> None:
        for number, body in waiting:
            found.update(await _cells(http, number, body))
            done(len(body["layers"]) * len(body["target_layers"]))

    await asyncio.gather(*(ask() for _ in range(_AT_ONCE)))
    return found


async def _cells(http: httpx.AsyncClient, number: int, body: Mapping[str, Any]) -> dict[Cell, Said]:
    answer = await http.post("/v1/inspect/patchscope", json=body)
    if not answer.is_success:
        raise RuntimeError(f"HTTP {answer.status_code}: {answer.text[:1000]}")
    return {
        (number, one["layer"], one["target_layer"]): Said(one["top"][0]["id"], one.get("text"))
        for one in answer.json()["cells"]
    }


@dataclass(frozen=True)
class Sampled:
    """Cells that were run one by one: the seconds of each, and what it said."""

    seconds: tuple[float, ...]
    said: Mapping[Cell, Said]


def one_by_one(
    model: OneByOne, tokenizer: Any, sweep: Sweep, share: float, done: Callable[[int], None]
) -> Sampled:
    """A `share` of the pairs of layers, drawn always alike, for every subject."""
    pairs = [(layer, goal) for layer in sweep.layers for goal in sweep.layers]
    count = max(1, round(share * len(pairs)))
    chosen = random.Random(0).sample(pairs, count)
    target = tuple(text_tokens(tokenizer, CAPITAL.format(PLACEHOLDER.strip())))
    place = target.index(text_tokens(tokenizer, PLACEHOLDER)[-1])
    sources = [tuple(text_tokens(tokenizer, SOURCE.format(name))) for name in sweep.subjects]
    seconds, said = [], {}
    model.say(sources[0], 0, target, place, 0, sweep.tokens)  # what is made once is not counted
    for layer, goal in chosen:
        for number, source in enumerate(sources):
            started = time.perf_counter()
            made = model.say(source, layer, target, place, goal, sweep.tokens)
            seconds.append(time.perf_counter() - started)
            text = tokenizer.decode(made, skip_special_tokens=True) if sweep.tokens > 1 else None
            said[number, layer, goal] = Said(made[0], text)
        done(len(sources))
    return Sampled(tuple(seconds), said)


def meanwhile(
    server: Server, model: str, sweep: Sweep, *, turns: int, seconds: float, tokens: int,
    done: Callable[[], None],
) -> tuple[list[Latency], list[Latency]]:  # fmt: skip
    """Chats alone and beside the sweep, in turns, every other pair the other way round."""
    alone: list[Latency] = []
    beside: list[Latency] = []

    async def with_sweep(http: httpx.AsyncClient) -> Latency:
        over = asyncio.Event()

        async def sweeping() -> None:
            while not over.is_set():
                for number, body in sweep.bodies():
                    if over.is_set():
                        return
                    await _cells(http, number, body)

        running = [asyncio.create_task(sweeping()) for _ in range(_AT_ONCE)]
        try:
            return await chats(http, model, tokens, seconds)
        finally:
            over.set()
            await asyncio.gather(*running)  # nothing of it is left for the next turn

    def by_themselves() -> None:
        alone.append(server.run(lambda http: chats(http, model, tokens, seconds)))
        done()

    def beside_it() -> None:
        beside.append(server.run(with_sweep))
        done()

    for turn in range(turns):
        for part in (by_themselves, beside_it) if turn % 2 == 0 else (beside_it, by_themselves):
            part()
    return alone, beside


def agreement(one: Mapping[Cell, Said], other: Mapping[Cell, Said]) -> float:
    """The share of cells that both have, and that say the same in both."""
    shared = [cell for cell in one if cell in other]
    if not shared:
        raise ValueError("no cell was run both ways")
    return statistics.fmean(
        one[cell].token == other[cell].token
        and (one[cell].text or "").strip() == (other[cell].text or "").strip()
        for cell in shared
    )


STATISTICS: dict[str, Callable[[Latency], float]] = {
    "time per token, mean": lambda one: statistics.fmean(one.per_token),
    "time per token, worst answer": lambda one: max(one.per_token),
    "between two tokens, p50": lambda one: quantile(one.gaps, 0.5),
    "between two tokens, p95": lambda one: quantile(one.gaps, 0.95),
    "between two tokens, p99": lambda one: quantile(one.gaps, 0.99),
    "first token, p50": lambda one: quantile(one.first, 0.5),
}
