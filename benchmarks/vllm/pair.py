"""Two engines in two processes, of which one computes at a time."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.child import Child
from benchmarks.vllm.diets import Batch

PROMPT = 16
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def child(
    model: Path, registry: Path, log: Path, *, steered: bool, eager: bool, threads: int
) -> Child:
    """A process of `benchmarks.vllm.worker`."""
    settings = {"model": str(model), "steered": steered, "eager": eager}
    environment = {
        **ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_PLUGINS": "steer" if steered else "",
        "STEER_REGISTRY": str(registry),
    }
    worker = "benchmarks.vllm.worker"
    return Child(sys.executable, worker, [json.dumps(settings)], log, environment)


@dataclass(frozen=True)
class Paired:
    """One round: step times in seconds, medians; the ratio is the median over the alternations,
    each of which is a few steps of one engine and then the same steps of the other."""

    plain: float
    steer: float
    ratio: float
    start_ratio: float


class Pair:
    """A plain engine and one with Steer on the same model."""

    def __init__(
        self, model: Path, registry: Path, logs: Path, *, eager: bool, threads: int
    ) -> None:
        self.children: list[Child] = []
        try:
            for steered in (False, True):
                log = logs / f"{'steer' if steered else 'plain'}.log"
                self.children.append(
                    child(model, registry, log, steered=steered, eager=eager, threads=threads)
                )
            for one in self.children:
                one.wait()
        except BaseException:
            self.close()
            raise
        self.plain, self.steer = self.children

    def decode(self, specs: Batch, *, steps: int, turn: int) -> Paired:
        """The same prompts on both engines, decoded `turn` steps at a time in alternation."""
        prompts = [[3 + (7 * n + 5 * t) % 2048 for t in range(PROMPT)] for n in range(len(specs))]
        # The first token comes with the prompt, the last one with what ends the request.
        tokens = steps + 2
        start = [
            self.plain.do("start", specs=[None] * len(specs), prompts=prompts, tokens=tokens),
            self.steer.do("start", specs=specs, prompts=prompts, tokens=tokens),
        ]
        plain: list[float] = []
        steer: list[float] = []
        ratios = []
        for number in range(steps // turn):
            sides = [(self.plain, plain), (self.steer, steer)]
            for one, seconds in sides if number % 2 else reversed(sides):
                seconds.extend(one.do("steps", count=turn))
            ratios.append(sum(steer[-turn:]) / sum(plain[-turn:]))
        self.plain.do("finish")
        steered = self.steer.do("finish")
        if any(spec is not None for spec in specs) and not steered:
            raise RuntimeError("the receipts say that no token was steered")
        return Paired(
            statistics.median(plain),
            statistics.median(steer),
            statistics.median(ratios),
            start[1] / start[0],
        )

    def close(self) -> None:
        for one in self.children:
            one.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
