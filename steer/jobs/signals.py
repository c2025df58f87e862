"""What passes between a running job and those outside of it.

In: it is told to stop by an exception out of its next report of progress. Those are no
`Exception`s, like asyncio's cancellation, so that a kind of job which catches what goes wrong with
its data does not catch these. Out: who wants to know when something happens to it is told so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class JobStopped(BaseException):
    """The job must not go on."""


class JobCancelled(JobStopped):
    """A client cancelled it."""


class RunnerStopping(JobStopped):
    """The server stops; the job is queued again or ends as interrupted."""


class LeaseLost(JobStopped):
    """This runner was held up for so long that another took the job: nothing may be written."""


class Changes:
    """Listeners by job. They are called from the job's thread, so they only pass the word on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, list[Callable[[], None]]] = {}

    @contextmanager
    def listening(self, job_id: str, listener: Callable[[], None]) -> Iterator[None]:
        """Inside the block `listener` is called after every change of the job."""
        with self._lock:
            self._listeners.setdefault(job_id, []).append(listener)
        try:
            yield
        finally:
            with self._lock:
                left = [one for one in self._listeners[job_id] if one is not listener]
                if left:
                    self._listeners[job_id] = left
                else:
                    del self._listeners[job_id]

    def tell(self, job_id: str) -> None:
        """Something happened to the job."""
        with self._lock:
            listeners = tuple(self._listeners.get(job_id, ()))
        for listener in listeners:
            listener()

    @property
    def count(self) -> int:
        """How many are listening."""
        with self._lock:
            return sum(map(len, self._listeners.values()))
