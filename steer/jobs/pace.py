"""Inference first: a job works in small pieces and rests in between while requests run."""

from __future__ import annotations

import time
from collections.abc import Callable

_SLICE = 0.05
"""Seconds after which a rest looks again whether requests still run, and whether to stop."""


class Pace:
    """Keeps a job's share of the time at `duty` while there is load.

    A piece of work that took t seconds is followed by a rest of t · (1/duty − 1) seconds, which
    ends early when the load goes away. `load` is how many sequences run or wait, `check` raises
    where the job must stop, `pause` waits for a time or until the job is told something.

    Assumes: one thread, in which the job runs; its own sequences do not count as load.
    """

    def __init__(
        self,
        load: Callable[[], int],
        check: Callable[[], None],
        pause: Callable[[float], object],
        *,
        duty: float,
        quiet_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.load, self._check, self._pause = load, check, pause
        self._duty, self._quiet = duty, quiet_seconds
        self._clock, self._thread_clock = clock, thread_clock
        self._last_load = float("-inf")
        self._own = thread_clock()
        self.rested_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether requests run now, or did a moment ago."""
        now = self._clock()
        if self.load() > 0:
            self._last_load = now
        return now - self._last_load < self._quiet

    def rest(self, engine_seconds: float) -> None:
        """Call after each piece, with the engine's time for it; the job's own is added."""
        self._check()
        own = self._thread_clock()
        spent, self._own = engine_seconds + own - self._own, own
        until = self._clock() + spent * (1 / self._duty - 1)
        while (now := self._clock()) < until and self.busy:
            self._pause(min(_SLICE, until - now))
            self.rested_seconds += self._clock() - now
            self._check()
        self._own = self._thread_clock()
