"""Steer's metrics among vLLM's own, at vLLM's `/metrics`.

With several API servers vLLM's metrics are merged from files that `prometheus_client` writes; there
Steer's counters and histograms are merged as well, and what is read from the engine, the plan cache
and the registry at the moment of asking is left out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger("steer.server")

_PATIENCE = 2.0
"""Seconds that an answer may wait for figures of the engine; then the last known are given."""


class Figures(Collector):
    """The metrics of `own`, read on a thread of their own.

    Some are asked of vLLM's engine over its event loop, so that code on this loop must not wait
    for them: it gets what was read the time before.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._reading: threading.Thread | None = None
        self._last: list[Metric] = []

    def describe(self) -> Iterator[Metric]:
        """Names without values, so that registering does not read the parts."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if self._reading is None or not self._reading.is_alive():
                # A daemon, because an engine that has died never answers.
                self._reading = threading.Thread(target=self._read, daemon=True)
                self._reading.start()
            reading = self._reading
        if not _on_a_loop():
            reading.join(_PATIENCE)
        return iter(self._last)

    def _read(self) -> None:
        try:
            self._last = list(self._own.collect())
        except Exception as error:  # the scraper still gets all of vLLM's own
            log.warning("Steer's figures could not be read: %r", error)


def expose(own: CollectorRegistry) -> None:
    """Adds the metrics of `own` to those that vLLM's server gives out."""
    REGISTRY.register(Figures(own))


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
