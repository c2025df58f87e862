"""What background jobs do to the latency of requests: the time between two tokens of chats that
decode steadily, without a job and with one, in rounds that take turns."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from steer_vectors import LIBRARY
from tqdm import tqdm

from benchmarks.workload import MODEL, prompts, vectors
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.jobs import JobLimits, JobRunner, builtin_kinds
from steer.jobs.fit_job import FitParams
from steer.jobs.sweep_job import SweepParams
from steer.registry.registry import Registry

CHATS, TOKENS, SECONDS = 8, 64, 6.0
HEADINGS = ("measured", "ms between tokens", "ratio to no job", "aim")


@dataclass(frozen=True)
class Round:
    """Gaps between tokens in one round, in seconds, and how far the job came in it."""

    gaps: tuple[float, ...]
    units: int = 0

    def at(self, quantile: float) -> float:
        ordered = sorted(self.gaps)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps)


STATISTICS: dict[str, Callable[[Round], float]] = {
    "p50": lambda one: one.at(0.5),
    "p95": lambda one: one.at(0.95),
    "p99": lambda one: one.at(0.99),
    "mean": lambda one: one.mean,
}


def run(rounds: int) -> list[tuple[str, str, str, str]]:
    """Medians over rounds, the range in brackets; ratios are taken round by round."""
    pairs, questions = _data()
    fit = FitParams(name="background", data=pairs, method="pca")
    sweep = SweepParams(vector="french", prompts=questions, score="words:bonjour", max_tokens=32)
    jobs: dict[str, tuple[BaseModel, str, float]] = {
        "fit, duty 0.03": (fit, "fit", 0.03),
        "fit, duty 0.2": (fit, "fit", 0.2),
        "fit, not paced": (fit, "fit", 1.0),
        "sweep, duty 0.03": (sweep, "sweep", 0.03),
    }
    found: dict[str, list[tuple[Round, Round]]] = {name: [] for name in jobs}
    with (
        TransformersEngine.load(MODEL, name="steer-demo") as engine,
        tempfile.TemporaryDirectory() as folder,
        Registry.open(Path(folder) / "registry") as registry,
    ):
        for name, vector in vectors().items():
            registry.add(name, vector)
        for number in tqdm(range(rounds + 1), desc="jobs", leave=False):
            for name, (params, kind, duty) in jobs.items():
                pair = _pair(engine, registry, params, kind, duty, job_first=number % 2 == 1)
                if number:  # the first is not counted
                    found[name].append(pair)
    return list(_rows(found))


def _pair(
    engine: TransformersEngine,
    registry: Registry,
    params: BaseModel,
    kind: str,
    duty: float,
    *,
    job_first: bool,
) -> tuple[Round, Round]:
    """One round without the job and one with it, next to each other in time."""
    plain = None if job_first else Round(tuple(asyncio.run(_chats(engine))))
    with _job(engine, registry, params, kind, duty) as units:
        gaps = asyncio.run(_chats(engine))
        beside = Round(tuple(gaps), units())
    return plain or Round(tuple(asyncio.run(_chats(engine)))), beside


def _rows(found: dict[str, list[tuple[Round, Round]]]) -> Iterator[tuple[str, str, str, str]]:
    plain = [one for pairs in found.values() for one, _ in pairs]
    for statistic, of in STATISTICS.items():
        yield f"no job, {statistic}", _spread([1000 * of(one) for one in plain], "{:.2f}"), "", ""
    for name, pairs in found.items():
        for statistic, of in STATISTICS.items():
            values = [1000 * of(beside) for _, beside in pairs]
            ratios = [of(beside) / of(one) for one, beside in pairs]
            aim = "≤ 1.1" if name.endswith("0.03") and statistic in ("p50", "p95") else ""
            yield f"{name}, {statistic}", _spread(values, "{:.2f}"), _spread(ratios, "{:.3f}"), aim
        done = statistics.median(beside.units for _, beside in pairs) / SECONDS
        yield f"{name}, units of the job per second", f"{done:.1f}", "", ""


def _spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{form.format(middle)} ({form.format(low)}–{form.format(high)})"


async def _chats(engine: TransformersEngine) -> list[float]:
    """Gaps between the tokens of `CHATS` chats at a time for `SECONDS`; a chat that ends is
    followed by another."""
    gaps: list[float] = []
    until = time.perf_counter() + SECONDS
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    asked = itertools.cycle(prompts(engine))

    async def client(number: int) -> None:
        for turn in itertools.count():
            request = GenerationRequest(f"{number}-{turn}", next(asked), sampling)
            last = None
            async for _ in engine.generate(request):
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now
                if now > until:
                    return

    await asyncio.gather(*(client(number) for number in range(CHATS)))
    return gaps


@contextmanager
def _job(
    engine: TransformersEngine,
    registry: Registry,
    params: BaseModel,
    kind: str,
    duty: float,
) -> Iterator[Callable[[], int]]:
    """A job that runs for as long as the block; yields how many units it has done."""
    runner = JobRunner(engine, registry, builtin_kinds(), JobLimits(duty=duty, progress_seconds=1))
    job = runner.submit(kind, params)
    runner.start()
    while runner.store.get(job.id).progress.total is None:  # it reads its data first
        time.sleep(0.05)
    try:
        yield lambda: _still_running(runner, job.id)
    finally:
        runner.cancel(job.id)
        runner.stop()


def _still_running(runner: JobRunner, job_id: str) -> int:
    job = runner.store.get(job_id)
    if job.state != "running":
        raise AssertionError(f"the job did not last for the round: {job}")
    return job.progress.done


def _data() -> tuple[str, list[str]]:
    """More pairs than any round reads, as JSON lines, and as many questions."""
    folder = LIBRARY / "demo" / "data"
    lines = (folder / "french.jsonl").read_text("utf-8").splitlines()
    chats = (folder / "heldout.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line)["messages"][-1]["content"] for line in chats]
    pairs = list(itertools.islice(itertools.cycle(lines), 4_000))
    return "\n".join(pairs) + "\n", list(itertools.islice(itertools.cycle(questions), 600))
