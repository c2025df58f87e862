"""Inspections run a few at a time, in threads of their own, and wait in a line that has an end.

Each keeps a thread until the engine has answered. In the threads that all routes share, enough of
them would leave none for anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from steer.errors import CapacityError

T = TypeVar("T")


class InspectionQueue:
    """Assumes: used from one event loop.

    Guarantees: at most `workers` inspections run and `queue` more wait; one whose client leaves
    while it waits is never begun.
    """

    def __init__(self, workers: int, queue: int) -> None:
        self._threads = CapacityLimiter(workers)
        self._queue = queue
        self._held = 0

    @property
    def running(self) -> int:
        """How many run."""
        return min(self._held, int(self._threads.total_tokens))

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._held - self.running

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, in its turn. Raises `CapacityError` (`inspection_queue_full`)."""
        if self._held >= self._threads.total_tokens + self._queue:
            raise CapacityError(
                f"{self.running} inspections run and {self.waiting} wait, as many as this server "
                "takes: try again later",
                code="inspection_queue_full",
            )
        self._held += 1
        try:
            return await to_thread.run_sync(work, limiter=self._threads)
        finally:
            self._held -= 1
