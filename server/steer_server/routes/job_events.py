"""Following a job: what the catalogue says, as soon as there is more of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from anyio import to_thread

from steer.errors import SteerError
from steer.jobs import JobRunner
from steer.registry.jobs.job_records import Job, JobEvent

LOOK_SECONDS = 1.0
"""How often a job is looked at that another server runs; those of this one tell."""

HEARTBEAT_SECONDS = 15.0
"""After so long without an event something is sent, so that proxies keep the connection."""


async def follow(
    jobs: JobRunner,
    job_id: str,
    after: int,
    *,
    look_seconds: float = LOOK_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> AsyncGenerator[JobEvent | Job | SteerError | None, None]:
    """Events numbered above `after` in order, and None after a long silence.

    The last item is the finished job, or the error that ended the following: the job may be
    forgotten meanwhile.
    """
    changed = asyncio.Event()
    silent_since = time.monotonic()
    with jobs.changes.listening(job_id, _waker(changed)):
        while True:
            changed.clear()
            try:
                job, found = await to_thread.run_sync(jobs.store.events, job_id, after)
            except SteerError as error:
                yield error
                return
            for event in found:
                yield event
                after, silent_since = event.number, time.monotonic()
            if job.finished:
                yield job
                return
            if time.monotonic() - silent_since >= heartbeat_seconds:
                yield None
                silent_since = time.monotonic()
            await _wait(changed, look_seconds)


def _waker(changed: asyncio.Event) -> Callable[[], None]:
    """Sets `changed` from any thread."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    return wake


async def _wait(changed: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(changed.wait(), seconds)
