"""Figures that other parts keep, read at the moment somebody asks for metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from steer.engines.base import Engine
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry
from steer_server.inspection_queue import InspectionQueue


class LiveFigures(Collector):
    """The engine's, the plan cache's and the registry's own counts as metrics."""

    def __init__(
        self, engine: Engine, plans: PlanCache, registry: Registry, inspections: InspectionQueue
    ) -> None:
        self._engine, self._plans, self._registry = engine, plans, registry
        self._inspections = inspections

    def describe(self) -> Iterator[Metric]:
        """Names without values, so that registering does not read the parts."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._of_engine()
        plans = self._plans.stats
        yield _counter("steer_plan_cache_hits", "Plans found compiled", plans.hits)
        yield _counter("steer_plan_cache_misses", "Plans that had to be compiled", plans.misses)
        held = self._inspections
        yield _gauge("steer_inspections_running", "Inspections that run", held.running)
        yield _gauge("steer_inspections_waiting", "Inspections in the queue", held.waiting)
        yield from self._of_registry()
        yield self._of_jobs()

    def _of_jobs(self) -> Metric:
        held = GaugeMetricFamily(
            "steer_jobs", "Jobs in the registry's catalogue", labels=["kind", "state"]
        )
        for (kind, state), count in sorted(self._registry.jobs.counts().items()):
            held.add_metric([kind, state], count)
        return held

    def _of_engine(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield _gauge("steer_slots", "Slots for different plans in one batch", stats.slots)
        yield _gauge("steer_slots_in_use", "Slots taken", stats.slots_in_use)
        yield _counter("steer_slot_waits", "Requests that waited for a slot", stats.slot_waits)
        yield _gauge("steer_sequences_running", "Sequences in the batch", stats.requests_running)
        yield _gauge("steer_sequences_waiting", "Sequences in the queue", stats.requests_waiting)
        extra = GaugeMetricFamily(
            "steer_engine_figure", "Figures particular to the engine", labels=["name"]
        )
        for name, value in sorted(stats.extra.items()):
            extra.add_metric([name], value)
        yield extra

    def _of_registry(self) -> Iterator[Metric]:
        stats = self._registry.stats()
        yield _gauge("steer_registry_bytes", "Bytes of all named artefacts", stats.blob_bytes)
        yield _gauge(
            "steer_registry_removed_bytes",
            "Bytes of removed artefacts that can be restored",
            stats.removed_bytes,
        )
        held = GaugeMetricFamily("steer_registry_artefacts", "Registered names", labels=["kind"])
        for kind, count in sorted({**stats.artefacts, "profile": stats.profiles}.items()):
            held.add_metric([kind], count)
        yield held
        done = CounterMetricFamily(
            "steer_registry_operations", "Operations on the registry", labels=["operation"]
        )
        for operation, count in sorted(stats.operations.items()):
            done.add_metric([operation], count)
        yield done


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
