"""Whole jobs over HTTP: the same chats, all at once, to a plain server and to one with Steer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_vectors import LIBRARY
from tqdm import tqdm

from benchmarks.intervals import verdict
from benchmarks.server import Server
from benchmarks.vllm.diets import Batch, add, all_kinds
from benchmarks.vllm.pair import ENVIRONMENT, Settings
from benchmarks.vllm.report import Table, rate, starts_percent, times
from benchmarks.vllm.shapes import Shape
from benchmarks.workload import CHATS, TOKENS

NAME = "model"
_SMALL, _REAL = 0.95, 0.99
"""Of plain vLLM's tokens per second: where the model is so small that little but the server is
measured, and on a real one."""
Start = list[dict[str, Any]]
"""What one start of both servers gave: a load, and tokens per second of each round."""


@dataclass(frozen=True)
class Load:
    """What the chats ask of Steer's server; the plain one is asked the same without specs."""

    name: str
    specs: Callable[[Shape, int], Batch]


LOADS = (
    Load("nothing steered", lambda _, count: [None] * count),
    Load("an addition for each chat", lambda _, count: [add(n, "all") for n in range(count)]),
    Load("all kinds, a spec for each chat", all_kinds),
)


def command(
    python: Path | str, model: str, *, name: str, dtype: str, rows: int, length: int, eager: bool
) -> list[str]:
    """vLLM's own server, whose port is called `PORT`."""
    return [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--served-model-name", name, "--host", "127.0.0.1", "--port", "PORT"),
        *("--dtype", dtype, "--max-num-seqs", str(rows), "--max-model-len", str(length)),
        *("--no-enable-prefix-caching", "--gpu-memory-utilization", "0.2"),
        *(["--enforce-eager"] if eager else []),
    ]


def environment(registry: Path | str, *, steered: bool) -> dict[str, str]:
    """An environment variable makes the difference between the two servers."""
    return {
        **{name: ENVIRONMENT[name] for name in _OF_SERVERS},
        "STEER_REGISTRY": str(registry),
        "VLLM_PLUGINS": "steer" if steered else "",
    }


_OF_SERVERS = (
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_NO_USAGE_STATS",
    "HF_HUB_OFFLINE",
)


def measure(
    shape: Shape,
    model: Path,
    registry: Path,
    folder: Path,
    settings: Settings,
    *,
    rounds: int,
    chats: int = CHATS,
    tokens: int = TOKENS,
) -> Start:
    """Starts both servers; every load to both, in turn, after a round that does not count."""
    found: dict[str, tuple[list[float], list[float]]] = {one.name: ([], []) for one in LOADS}
    asked = messages(chats)
    with ExitStack() as stack:
        plain, steer = (
            started(stack, shape, model, registry, folder, settings, chats, steered=steered)
            for steered in (False, True)
        )
        for number in tqdm(range(rounds + 1), desc=f"serving {shape.name}", leave=False):
            # Every other round runs backwards: nobody always follows the same neighbour.
            for load in LOADS if number % 2 else reversed(LOADS):
                specs = load.specs(shape, chats)
                unsteered: Batch = [None] * chats
                rates_of = found[load.name]
                sides = [(plain, unsteered, rates_of[0]), (steer, specs, rates_of[1])]
                for server, wanted, rates in sides if number % 2 else reversed(sides):
                    speed = _speed(server, asked, wanted, tokens)
                    if number:
                        rates.append(speed)
    return [{"load": name, "plain": one, "steer": other} for name, (one, other) in found.items()]


def messages(count: int) -> list[Any]:
    """Held-out chats of the demo."""
    lines = (LIBRARY / "demo" / "data" / "heldout.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line)["messages"] for line in lines]
    return found[:: max(1, len(found) // count)][:count]


def table(title: str, shape: Shape, starts: Sequence[Start]) -> Table:
    """One row for each load, over all starts."""
    least = _SMALL if shape.name == "demo" else _REAL
    rows = []
    for case in starts[0]:
        rounds = [one for start in starts for one in start if one["load"] == case["load"]]
        ratios = [
            [a / b for a, b in zip(one["steer"], one["plain"], strict=True)] for one in rounds
        ]
        speeds = [rate([each for one in rounds for each in one[who]]) for who in ("plain", "steer")]
        rows.append(
            (
                case["load"],
                *speeds,
                times(ratios),
                starts_percent(ratios),
                f"≥ {least:g} ×",
                verdict(ratios, least, at_least=True),
            )
        )
    columns = ("load", "plain, tokens/s", "Steer, tokens/s", "Steer is", "start by start", "aim")
    return Table(f"{title}, {len(starts)} starts", (*columns, ""), rows)


def started(
    stack: ExitStack,
    shape: Shape,
    model: Path,
    registry: Path,
    folder: Path,
    settings: Settings,
    rows: int,
    *,
    steered: bool,
) -> Server:
    words = command(
        sys.executable, str(model), name=NAME, dtype=settings.dtype, rows=rows,
        length=shape.length, eager=settings.eager,
    )  # fmt: skip
    variables = {
        **environment(registry, steered=steered),
        "OMP_NUM_THREADS": str(settings.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = folder / f"server-{'steer' if steered else 'plain'}.log"
    server = Server(words, log, variables)
    stack.callback(server.close)
    server.wait()
    return server


def _speed(server: Server, asked: Sequence[Any], specs: Batch, tokens: int) -> float:
    """Tokens per second from the first request that is sent to the last answer that is read."""
    common = {"model": NAME, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    bodies: list[Mapping[str, Any]] = [
        {**common, "messages": chat, **({} if spec is None else {"steering": spec})}
        for chat, spec in zip(asked, specs, strict=True)
    ]
    seconds, answers = server.ask(bodies)
    for spec, answer in zip(specs, answers, strict=True):
        made = answer["usage"]["completion_tokens"]
        if made != tokens:
            raise RuntimeError(f"an answer has {made} tokens")
        if (spec is None) != (answer.get("steering") is None):
            raise RuntimeError(f"the receipt of {spec} is {answer.get('steering')}")
    steered = [answer["steering"]["fingerprint"] for answer in answers if "steering" in answer]
    if len(set(steered)) != sum(spec is not None for spec in specs):
        raise RuntimeError("two specs have one fingerprint")
    return tokens * len(answers) / seconds
