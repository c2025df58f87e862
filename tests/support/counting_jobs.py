"""A kind of job that counts, under a test's control."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liveness import LIVENESS_SECONDS
from pydantic import BaseModel, ConfigDict

from steer.errors import SteerError
from steer.jobs import JobContext, JobKind, JobLimits, JobRunner
from steer.registry.jobs.job_records import Job

QUICK = JobLimits(progress_seconds=0, lease_seconds=LIVENESS_SECONDS, poll_seconds=0.02)
"""Every report is written down, and work is looked for at once. No lease lapses because a thread
that should have renewed it did not get to run; tests of that pass the time themselves."""


class CountParams(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = 3
    fail_at: int | None = None
    crash_at: int | None = None


class Gate:
    """Lets a counting job take its steps: `allow(n)`; `None` lets all through."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        self.open = True
        self.begun = 0
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    def allow(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def step(self) -> None:
        self.reached.release()
        if not self.open:
            assert self._permits.acquire(timeout=LIVENESS_SECONDS)

    def await_step(self) -> None:
        """Returns once a job has come to one more step."""
        assert self.reached.acquire(timeout=LIVENESS_SECONDS)


def counting(gate: Gate, *, repeatable: bool = False, any_model: bool = False) -> JobKind[Any]:
    """A kind of job that counts, one report for each step."""

    def run(context: JobContext, params: CountParams) -> dict[str, Any]:
        with gate.lock:
            gate.begun += 1
            gate.running += 1
            gate.most = max(gate.most, gate.running)
        try:
            for step in range(params.steps):
                gate.step()
                if params.fail_at == step:
                    raise SteerError("told to fail", code="told", param="/fail_at")
                if params.crash_at == step:
                    raise ZeroDivisionError("a bug")
                context.progress(step + 1, params.steps, "counting")
        finally:
            with gate.lock:
                gate.running -= 1
        return {"counted": params.steps, "files": sorted(_names(context.files))}

    return JobKind("count", CountParams, run, repeatable=repeatable, any_model=any_model)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


Make = Callable[..., JobRunner]


def wait_for(runner: JobRunner, job_id: str, wanted: Callable[[Job], bool]) -> Job:
    """The job once it is as `wanted`; woken by its changes, not by time."""
    changed = threading.Event()
    with runner.changes.listening(job_id, changed.set):
        while True:
            changed.clear()
            job = runner.store.get(job_id)
            if wanted(job):
                return job
            assert changed.wait(LIVENESS_SECONDS), f"the job stays {job}"


def finished(runner: JobRunner, job_id: str) -> Job:
    return wait_for(runner, job_id, lambda job: job.finished)
