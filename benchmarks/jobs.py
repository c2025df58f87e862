"""What background jobs do to the latency of requests: the time between two tokens of chats that
decode steadily, while a job is let go and held back in turns of a second and a half.

Turns are short because a shared machine drifts: each turn with the job is compared with the turn
before it, in the same stream of chats.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from steer_vectors import LIBRARY
from tqdm import tqdm

from benchmarks.workload import MODEL, prompts, vectors
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.requests.measuring import SweepRequest
from steer.fit.requests.pairs import PairsRequest
from steer.jobs import JobLimits, JobRunner, builtin_kinds
from steer.registry.registry import Registry

CHATS, TOKENS = 8, 64
TURN_SECONDS, SETTLE_SECONDS = 1.5, 0.1
HEADINGS = ("measured", "ms between tokens", "ratio to no job", "aim")


@dataclass(frozen=True)
class Round:
    """Gaps between tokens in one turn, in seconds."""

    gaps: tuple[float, ...]

    def at(self, quantile: float) -> float:
        ordered = sorted(self.gaps)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps)


@dataclass(frozen=True)
class Measured:
    """Turns without and with a job, in pairs, and how far the job came."""

    pairs: tuple[tuple[Round, Round], ...]
    units: int


STATISTICS: dict[str, Callable[[Round], float]] = {
    "p50": lambda one: one.at(0.5),
    "p95": lambda one: one.at(0.95),
    "p99": lambda one: one.at(0.99),
    "mean": lambda one: one.mean,
}


def run(rounds: int) -> list[tuple[str, str, str, str]]:
    """Medians over turns, the quartiles in brackets; ratios are taken turn by turn."""
    pairs, questions = _data()
    fit = PairsRequest(name="background", data=pairs, method="pca")
    sweep = SweepRequest(vector="french", prompts=questions, score="words:bonjour", max_tokens=32)
    jobs: dict[str, tuple[BaseModel, str, float]] = {
        "fit, duty 0.03": (fit, "fit", 0.03),
        "fit, duty 0.2": (fit, "fit", 0.2),
        "fit, not paced": (fit, "fit", 1.0),
        "sweep, duty 0.03": (sweep, "sweep", 0.03),
    }
    found: dict[str, Measured] = {}
    with (
        TransformersEngine.load(MODEL, name="steer-demo") as engine,
        tempfile.TemporaryDirectory() as folder,
        Registry.open(Path(folder) / "registry") as registry,
    ):
        for name, vector in vectors().items():
            registry.add(name, vector)
        for name, (params, kind, duty) in tqdm(jobs.items(), desc="jobs", leave=False):
            found[name] = _measured(engine, registry, params, kind, duty, pairs=4 * rounds)
    return list(_rows(found))


def _measured(
    engine: TransformersEngine,
    registry: Registry,
    params: BaseModel,
    kind: str,
    duty: float,
    *,
    pairs: int,
) -> Measured:
    """So many turns without the job, each with one beside it."""
    allowed = threading.Event()
    allowed.set()

    def load() -> int:
        """What the job asks before and after each piece: there it is held back."""
        allowed.wait()
        return CHATS

    limits = JobLimits(duty=duty, progress_seconds=0.2)
    runner = JobRunner(engine, registry, builtin_kinds(), limits, load=load)
    job = runner.submit(kind, params)
    runner.start()
    while runner.store.get(job.id).progress.total is None:  # it reads its data first
        time.sleep(0.05)
    try:
        turns = asyncio.run(_turns(engine, allowed, 2 * pairs))
        after = runner.store.get(job.id)
        if after.state != "running":
            raise AssertionError(f"the job did not last: {after}")
    finally:
        allowed.set()
        runner.cancel(job.id)
        runner.stop()
    return Measured(tuple(zip(turns[::2], turns[1::2], strict=True)), after.progress.done)


def _rows(found: dict[str, Measured]) -> Iterator[tuple[str, str, str, str]]:
    plain = [one for measured in found.values() for one, _ in measured.pairs]
    for statistic, of in STATISTICS.items():
        yield f"no job, {statistic}", _spread([1000 * of(one) for one in plain], "{:.2f}"), "", ""
    for name, measured in found.items():
        for statistic, of in STATISTICS.items():
            values = [1000 * of(beside) for _, beside in measured.pairs]
            ratios = [of(beside) / of(one) for one, beside in measured.pairs]
            aim = "≤ 1.1" if name.endswith("0.03") and statistic in ("p50", "p95") else ""
            yield f"{name}, {statistic}", _spread(values, "{:.2f}"), _spread(ratios, "{:.3f}"), aim
        speed = measured.units / (len(measured.pairs) * TURN_SECONDS)
        yield f"{name}, units of the job per second", f"{speed:.1f}", "", ""


def _spread(values: list[float], form: str) -> str:
    """The median, and the quartiles in brackets."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{form.format(middle)} ({form.format(low)}–{form.format(high)})"


async def _turns(engine: TransformersEngine, allowed: threading.Event, count: int) -> list[Round]:
    """Gaps between the tokens of `CHATS` chats at a time, turn by turn, the job held back in the
    first, third and so on; a chat that ends is followed by another."""
    seen: list[tuple[float, float]] = []
    done = False
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    asked = itertools.cycle(prompts(engine))

    async def client(number: int) -> None:
        for turn in itertools.count():
            request = GenerationRequest(f"{number}-{turn}", next(asked), sampling)
            last = None
            async for _ in engine.generate(request):
                now = time.perf_counter()
                if last is not None:
                    seen.append((now, now - last))
                last = now
            if done:
                return

    clients = asyncio.gather(*(client(number) for number in range(CHATS)))
    await asyncio.sleep(TURN_SECONDS)  # not counted
    starts = []
    for number in range(count):
        allowed.set() if number % 2 else allowed.clear()
        starts.append(time.perf_counter())
        await asyncio.sleep(TURN_SECONDS)
    done = True
    await clients
    # A piece that had begun when its turn ended reaches a little into the next.
    return [
        Round(tuple(gap for at, gap in seen if start + SETTLE_SECONDS <= at < start + TURN_SECONDS))
        for start in starts
    ]


def _data() -> tuple[str, list[str]]:
    """More pairs than any round reads, as JSON lines, and as many questions."""
    folder = LIBRARY / "demo" / "data"
    lines = (folder / "french.jsonl").read_text("utf-8").splitlines()
    chats = (folder / "heldout.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line)["messages"][-1]["content"] for line in chats]
    pairs = list(itertools.islice(itertools.cycle(lines), 8_000))
    return "\n".join(pairs) + "\n", list(itertools.islice(itertools.cycle(questions), 600))
