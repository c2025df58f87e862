"""Runs jobs in threads of this process, taken from the catalogue that all servers share."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from steer.engines.base import Engine
from steer.engines.journal import JournaledEngine
from steer.engines.threads import bound_threads
from steer.errors import SteerError
from steer.jobs.engine import BackgroundEngine
from steer.jobs.kinds.captured import capture_of
from steer.jobs.kinds.kind import JobContext, JobKind, JobKinds
from steer.jobs.limits import JobLimits
from steer.jobs.pace import Pace
from steer.jobs.signals import Changes, JobCancelled, LeaseLost, RunnerStopping
from steer.registry.jobs.job_records import Claim, Job, JobFailure, JobProgress
from steer.registry.jobs.job_store import JobDraft, new_job_id
from steer.registry.registry import Registry

log = logging.getLogger("steer.jobs")

_STOPPED = JobFailure("job_interrupted", "the server that ran this job was stopped")
_LAPSED = JobFailure("job_interrupted", "the server that ran this job is gone")


@dataclass
class _Run:
    """A job in one of this runner's threads."""

    claim: Claim
    told: threading.Event = field(default_factory=threading.Event)
    """Set when the job should look whether it has to stop."""
    cancelled: bool = False
    written: float = float("-inf")
    latest: JobProgress = field(default_factory=JobProgress)


class JobRunner:
    """Queues, runs and cancels jobs of one server.

    Assumes: the engine is started before `start` and stopped after `stop`; `load` counts the
    sequences of clients that run or wait.
    Guarantees: at most `limits.workers` jobs run here; a job whose runner dies is taken up again
    or ends as interrupted, here or in another server on the same registry; no exception of a job
    leaves its thread; no job fails because its server stops, or because the engine has died, which
    `alive` tells; what the engine has told a job of a repeatable kind is not asked again by the
    next attempt at it on this machine. `ended` is called with each job that this runner ends, and
    with its seconds.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        kinds: JobKinds,
        limits: JobLimits = JobLimits(),  # noqa: B008 - frozen
        *,
        load: Callable[[], int] | None = None,
        alive: Callable[[], bool] = lambda: True,
        ended: Callable[[Job, float], None] | None = None,
    ) -> None:
        self.kinds, self.limits, self.store = kinds, limits, registry.jobs
        self.changes = Changes()
        self._engine, self._registry = engine, registry
        self._load = load if load is not None else lambda: _load_of(engine)
        self._alive, self._ended = alive, ended
        self._owner = uuid.uuid4().hex
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()
        self._work = threading.Condition()
        self._posted = 0
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def _model(self) -> str:
        """What servers of the same model agree on, whatever each calls it and wherever it lies."""
        return self._engine.info.own_name

    # Clients

    def submit(
        self, kind_name: str, params: BaseModel, files: Mapping[str, Path] | None = None
    ) -> Job:
        """Queues a job; `files` are moved to where it finds them.

        Raises what the kind's check raises, and `CapacityError` where too many wait.
        """
        kind = self.kinds[kind_name]
        kind.check(self._engine, self._registry, params)
        draft = JobDraft(
            id=new_job_id(),
            kind=kind.name,
            params=params.model_dump_json(by_alias=True, exclude_none=True),
            request=json.dumps(kind.described(params), ensure_ascii=False),
            model=None if kind.runs_anywhere(self._engine, params) else self._model,
            place=self._registry.job_files.place if files or capture_of(params) else None,
        )
        with self._registry.job_files.adding(draft.id, files or {}):
            job = self.store.submit(draft, queue=self.limits.queue)
        self._post()
        return job

    def cancel(self, job_id: str) -> Job:
        """Cancels a job; see `JobStore.cancel`."""
        job, ended = self.store.cancel(job_id)
        with self._lock:
            run = self._runs.get(job_id)
        if run is not None:
            run.cancelled = True
            run.told.set()
        if ended:
            self._close(job, 0.0)
        self.changes.tell(job_id)
        return job

    def remove(self, job_id: str) -> Job:
        """Forgets a finished job; see `JobStore.remove`."""
        job = self.store.remove(job_id)
        self._registry.job_files.remove(job_id)
        self._registry.job_outputs.remove(job_id)
        self.changes.tell(job_id)
        return job

    # Life

    def start(self) -> None:
        """Takes up work that a dead server left, and begins to run jobs."""
        if self._threads:
            return
        self._guarded(self._recover)
        self._guarded(lambda: self._registry.job_files.clean(self.store.unfinished))
        self._guarded(lambda: self._registry.job_outputs.clean(self.store.fetched_from))
        targets = [("keeper", self._keep), *(("worker", self._serve),) * self.limits.workers]
        for role, target in targets:
            thread = threading.Thread(target=target, name=f"steer-jobs-{role}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, patience: float = 10.0) -> None:
        """Stops the running jobs at their next report; they are queued again where that is safe.

        A job that does not report for `patience` seconds is given up: whatever it does afterwards
        changes nothing. May be called twice; a runner that was stopped is not started again.
        """
        self._stopping.set()
        with self._lock:
            for run in self._runs.values():
                run.told.set()
        self._post()
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._threads.clear()
        with self._lock:
            left = [run.claim for run in self._runs.values()]
        for claim in left:
            self._guarded(partial(self._give_up, claim))

    def _give_up(self, claim: Claim) -> Job | None:
        again = self.kinds[claim.kind].repeatable
        return self.store.give_up(claim, again=again, error=_STOPPED)

    # Threads

    def _keep(self) -> None:
        """Renews leases, and looks for those that lapsed."""
        while not self._stopping.wait(self.limits.lease_seconds / 3):
            self._guarded(self._renew)
            self._guarded(self._recover)

    def _renew(self) -> None:
        with self._lock:
            running = tuple(self._runs)
        if running:
            self.store.renew(self._owner, running, lease=self.limits.lease_seconds)

    def _recover(self) -> None:
        repeatable = [kind.name for kind in self.kinds.values() if kind.repeatable]
        found = self.store.recover(
            repeatable=repeatable, attempts=self.limits.attempts, error=_LAPSED
        )
        if found:
            log.warning("%d jobs of servers that are gone were taken up", found)
            self._post()

    def _serve(self) -> None:
        bound_threads(self.limits.threads)
        while not self._stopping.is_set():
            posted = self._posted
            claim = self._guarded(self._claim)
            if claim is not None:
                self._run(claim)
                continue
            with self._work:
                if self._posted == posted:
                    self._work.wait(self.limits.poll_seconds)

    def _claim(self) -> Claim | None:
        return self.store.claim(
            self._owner,
            kinds=tuple(self.kinds),
            model=self._model,
            place=self._registry.job_files.place,
            lease=self.limits.lease_seconds,
        )

    def _run(self, claim: Claim) -> None:
        run = _Run(claim)
        with self._lock:
            self._runs[claim.job_id] = run
        self.changes.tell(claim.job_id)
        started = time.monotonic()
        try:
            job = self._guarded(lambda: self._outcome(run))
        finally:
            with self._lock:
                del self._runs[claim.job_id]
        if job is not None and job.finished:
            self._close(job, time.monotonic() - started)
        self.changes.tell(claim.job_id)

    def _outcome(self, run: _Run) -> Job | None:
        """Runs the job and writes down how it ended; None where that was no longer ours to say."""
        claim, store = run.claim, self.store
        kind = self.kinds[claim.kind]
        try:
            result = self._result(run, kind)
            if run.latest.done:
                store.progress(claim, run.latest)
            return store.finish(claim, "succeeded", result=result)
        except JobCancelled:
            return store.finish(claim, "cancelled")
        except RunnerStopping:
            return self._give_up(claim)
        except LeaseLost:
            log.warning("job %s was taken by another server: this one was held up", claim.job_id)
            return None
        except Exception as error:
            if self._ends():
                return self._give_up(claim)
            return store.finish(claim, "failed", error=_failure(claim, error))

    def _ends(self) -> bool:
        """Whether this server is at its end: then what goes wrong in a job is no fault of its own.

        An engine may die before anybody says that the server stops. No job can run here then.
        """
        if not self._alive():
            self._stopping.set()
        return self._stopping.is_set()

    def _result(self, run: _Run, kind: JobKind[Any]) -> dict[str, Any]:
        params = kind.params.model_validate(run.claim.params)
        pace = Pace(
            self._load,
            lambda: self._check(run),
            run.told.wait,
            duty=self.limits.duty,
            quiet_seconds=self.limits.quiet_seconds,
        )
        with self._registry.scratch() as scratch:
            scratch.mkdir()
            context = JobContext(
                engine=BackgroundEngine(self._remembering(run, kind), pace, self.limits),
                registry=self._registry,
                scratch=scratch,
                outputs=self._registry.job_outputs.folder(run.claim.job_id),
                files=self._registry.job_files.folder(run.claim.job_id),
                progress=lambda done, total=None, note="": self._progress(
                    run, JobProgress(done, total, note)
                ),
                answers=self._registry.job_files.answers(run.claim.job_id),
            )
            result = kind.run(context, params)
        json.dumps(result, allow_nan=False)  # what is no JSON is the kind's bug: it fails here
        return result

    def _remembering(self, run: _Run, kind: JobKind[Any]) -> Engine:
        """The engine, with what an earlier attempt at the job had said and read with it."""
        if not kind.repeatable:
            return self._engine
        return JournaledEngine(self._engine, self._registry.job_files.journal(run.claim.job_id))

    def _progress(self, run: _Run, progress: JobProgress) -> None:
        self._check(run)
        run.latest = progress
        now = time.monotonic()
        if now - run.written < self.limits.progress_seconds:
            return
        run.written = now
        job = self.store.progress(run.claim, progress)
        if job is None:
            raise LeaseLost
        self.changes.tell(job.id)
        if job.cancelling:  # through another server, perhaps
            raise JobCancelled

    def _check(self, run: _Run) -> None:
        if run.cancelled:
            raise JobCancelled
        if self._stopping.is_set():
            raise RunnerStopping

    def _close(self, job: Job, seconds: float) -> None:
        """What follows the end of a job."""
        self._registry.job_files.remove(job.id)
        self._guarded(lambda: self.store.prune(self.limits.keep))
        self._guarded(lambda: self._registry.job_outputs.clean(self.store.fetched_from))
        if self._ended is not None:
            self._ended(job, seconds)

    def _post(self) -> None:
        with self._work:
            self._posted += 1
            self._work.notify_all()

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """The answer of `step`; None, and the reason in the log, where it fails.

        The thread goes on. A job whose end could not be written down is taken up when its lease,
        which nobody renews, has lapsed.
        """
        try:
            return step()
        except Exception:
            log.exception("jobs: the catalogue could not be used")
            return None


def _failure(claim: Claim, error: Exception) -> JobFailure:
    """What a client is told of `error`."""
    if isinstance(error, SteerError):
        return JobFailure(error.code, error.message, error.param)
    log.error("job %s (%s) failed", claim.job_id, claim.kind, exc_info=error)
    # Not its text: that may hold paths of the server, and the log has it.
    return JobFailure(
        "job_failed",
        f"the job failed by a fault of the server ({type(error).__name__}): its log says more",
    )


def _load_of(engine: Engine) -> int:
    stats = engine.stats()
    return stats.requests_running + stats.requests_waiting
