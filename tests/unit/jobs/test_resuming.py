"""A job that is begun again goes on from what was said and read before its server died."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_jobs import QUICK, finished, wait_for
from tiny_models import byte_model

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Captured, CaptureRequest, Completion, Engine, GenerationRequest
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError
from steer.jobs import JobRunner, builtin_kinds
from steer.registry.jobs.job_store import JobStore
from steer.registry.registry import Registry

PROMPTS = [f"{word} {n}" for n in range(8) for word in ("how", "why", "who")]
MAKE = {
    "instruction": "be loud!",
    "opposite": "be quiet",
    "place": "after",
    "name": "loud",
    "prompts": PROMPTS,
    "nulls": 1,
    "max_tokens": 6,
    "seed": 1,
}
MEASURE = {"prompts": PROMPTS[:6], "score": "regex:[aeiou]", "max_tokens": 6, "nulls": 1}
STEERED = {"interventions": [{"kind": "add", "vector": "given", "strength": 2.0}]}
CASES: dict[str, dict[str, Any]] = {
    "make": MAKE,
    "calibrate": {**MEASURE, "vector": "given", "strengths": [0.5, 1.0, 2.0, 3.0]},
    "evaluate": {
        **MEASURE,
        "instruction": "be loud!",
        "methods": [{"name": "given", "steering": STEERED}],
    },
    "fit": {
        "name": "fitted",
        "pairs": [
            {"positive": f"{one} be loud!", "negative": f"{one} be quiet"} for one in PROMPTS
        ],
        "choose": "effect",
    },
}


class Watched:
    """An engine that tells what it was asked for, and is gone after `calls` calls."""

    def __init__(self, engine: Engine, calls: int | None = None) -> None:
        self._engine, self._left = engine, calls
        self.said: list[Any] = []
        self.alive = True

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self._call()
        found = self._engine.complete(requests)
        for one in requests:
            plan = None if one.plan is None else one.plan.fingerprint
            self.said.append((one.prompt, plan, one.sampling))
        return found

    def capture(self, request: CaptureRequest) -> list[Captured]:
        self._call()
        return self._engine.capture(request)

    def _call(self) -> None:
        if self._left == 0:
            self.alive = False
            raise EngineError("the engine is gone")
        self._left = None if self._left is None else self._left - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def lively() -> TransformersEngine:
    model = byte_model(initializer_range=0.2)
    return TransformersEngine(model, ByteTokenizer(), name="lively", rows=8, slots=32)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    with lively() as running:
        yield running


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        opened.add("given", ControlVector.of({1: torch.linspace(-1, 1, 32)}, model="lively"))
        yield opened


def runner_on(engine: Any, registry: Registry) -> JobRunner:
    alive = (lambda: engine.alive) if isinstance(engine, Watched) else (lambda: True)
    return JobRunner(engine, registry, builtin_kinds(), QUICK, alive=alive)


def submitted(runner: JobRunner, kind: str) -> str:
    params = runner.kinds[kind].params.model_validate(CASES[kind])
    return runner.submit(kind, params).id


@pytest.mark.parametrize("kind", CASES)
def test_it_asks_for_nothing_twice_and_comes_to_the_same(
    kind: str, engine: TransformersEngine, registry: Registry, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "other") as other:
        other.add("given", registry.vector("given"))
        undisturbed = Watched(engine)
        runner = runner_on(undisturbed, other)
        runner.start()
        whole = finished(runner, submitted(runner, kind))
        runner.stop()
    assert whole.state == "succeeded", whole.error

    said: list[Any] = []
    job_id = None
    for calls in (2, 3, None):
        watched = Watched(engine, calls)
        runner = runner_on(watched, registry)
        job_id = job_id or submitted(runner, kind)
        runner.start()
        job = wait_for(runner, job_id, lambda one: one.finished or not watched.alive)  # noqa: B023
        runner.stop()
        said += watched.said

    assert job.state == "succeeded", job.error
    assert job.attempt > 1
    # Scores that were read in other batches round otherwise.
    assert dict(leaves(job.result)) == pytest.approx(dict(leaves(whole.result)), abs=1e-3)
    assert len(said) == len(set(said)) == len(set(undisturbed.said))
    assert not registry.job_files.journal(job_id).exists()


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a result, by where they stand; yes and no are 1 and 0."""
    if isinstance(value, bool | int | float):
        yield at, float(value)
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items:
            yield from leaves(one, f"{at}/{key}")


CRASH = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import test_resuming as case
from steer.registry.registry import Registry

class Killed(case.Watched):
    def _call(self):
        if self._left == 0:
            print(job, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        super()._call()

with case.lively() as engine, Registry.open(sys.argv[1]) as registry:
    runner = case.runner_on(Killed(engine, 12), registry)
    job = case.submitted(runner, "make")
    runner.start()
    signal.pause()
"""


def test_a_killed_server_is_taken_over(engine: TransformersEngine, tmp_path: Path) -> None:
    root, here = tmp_path / "shared", Path(__file__)
    support = here.parents[2] / "support"
    paths = [str(here.parent), str(support), str(support / "models")]
    command = [sys.executable, "-c", CRASH, str(root), *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        job_id = process.stdout.readline().strip()
        assert process.wait() == -signal.SIGKILL
    with Registry.open(root) as registry:
        begun = registry.job_files.journal(job_id).read_text("utf-8").count("\n")
        watched = Watched(engine)
        runner = runner_on(watched, registry)
        runner.store = JobStore(registry._catalogue, lambda: datetime(2100, 1, 1))
        runner.start()  # the lease has lapsed by then
        job = finished(runner, job_id)
        runner.stop()
    assert (job.state, job.attempt) == ("succeeded", 2), job.error
    assert begun > 30
    assert {one.name for one in (root / "jobs").iterdir()} == {"files.lock", "place"}
