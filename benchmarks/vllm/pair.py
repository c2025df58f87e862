"""Engines in processes of their own, of which one computes at a time."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

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


def prompts_of(count: int) -> list[list[int]]:
    """So many prompts, each of `PROMPT` tokens of its own."""
    return [[3 + (7 * n + 5 * t) % 2048 for t in range(PROMPT)] for n in range(count)]


@dataclass(frozen=True)
class Settings:
    """What all engines of a run share. `weights` are read from the model's folder, or random."""

    eager: bool
    threads: int = 1
    dtype: str = "float32"
    weights: bool = True


def child(model: Path, registry: Path, log: Path, settings: Settings, *, steered: bool) -> Child:
    """A process of `benchmarks.vllm.worker`."""
    orders = {
        "model": str(model),
        "steered": steered,
        "eager": settings.eager,
        "dtype": settings.dtype,
        "weights": settings.weights,
    }
    environment = {
        **ENVIRONMENT,
        "OMP_NUM_THREADS": str(settings.threads),
        "VLLM_PLUGINS": "steer" if steered else "",
        "STEER_REGISTRY": str(registry),
    }
    worker = "benchmarks.vllm.worker"
    return Child(sys.executable, worker, [json.dumps(orders)], log, environment)


@dataclass(frozen=True)
class Paired:
    """One round: step times in seconds, medians; the ratio is the median over the alternations,
    each of which is a few steps of one engine and then the same steps of the other."""

    plain: float
    other: float
    ratio: float
    start_ratio: float


class Pair:
    """A plain engine and one with Steer on the same model, and with `control` another plain one."""

    def __init__(
        self, model: Path, registry: Path, logs: Path, settings: Settings, *, control: bool = False
    ) -> None:
        self.children: list[Child] = []
        names = ["plain", "steer", *(["control"] if control else [])]
        try:
            for name in names:
                log, steered = logs / f"{name}.log", name == "steer"
                self.children.append(child(model, registry, log, settings, steered=steered))
            for one in self.children:
                one.wait()
        except BaseException:
            self.close()
            raise
        self.plain, self.steer = self.children[:2]
        self.control = self.children[2] if control else None

    def decode(
        self,
        specs: Batch,
        *,
        steps: int,
        turn: int,
        control: bool = False,
        inspect: dict[str, Any] | None = None,
    ) -> Paired:
        """The same prompts on the plain engine and on Steer's, or on the control, decoded `turn`
        steps at a time in alternation; Steer's reads what `inspect` asks for."""
        other = self.control if control else self.steer
        if other is None:
            raise RuntimeError("this pair was started without a control")
        prompts = prompts_of(len(specs))
        # The first token comes with the prompt, the last one with what ends the request.
        tokens = steps + 2
        start = [
            self.plain.do("start", specs=[None] * len(specs), prompts=prompts, tokens=tokens),
            other.do("start", specs=specs, prompts=prompts, tokens=tokens, inspect=inspect),
        ]
        seconds: tuple[list[float], list[float]] = ([], [])
        ratios = []
        for number in range(steps // turn):
            sides = list(zip((self.plain, other), seconds, strict=True))
            for one, found in sides if number % 2 else reversed(sides):
                found.extend(one.do("steps", count=turn))
            ratios.append(sum(seconds[1][-turn:]) / sum(seconds[0][-turn:]))
        self.plain.do("finish")
        steered = other.do("finish")
        if any(spec is not None for spec in specs) and not steered:
            raise RuntimeError("the receipts say that no token was steered")
        plain, theirs = map(statistics.median, seconds)
        return Paired(plain, theirs, statistics.median(ratios), start[1] / start[0])

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
