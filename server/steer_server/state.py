"""What every route works with, and how it gets it.

The routers know nothing else about the application they are mounted on: whoever mounts them puts a
`Serving` at `app.state.steer`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.jobs import JobRunner, builtin_kinds, hub
from steer.model import bare_name
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry
from steer_server.inspection_queue import InspectionQueue
from steer_server.metrics import Metrics
from steer_server.settings import ServerSettings

_PROBES = 4
_SEARCHES = 4


@dataclass(frozen=True)
class Serving:
    """One served model with its artefacts, settings and figures."""

    engine: Engine
    registry: Registry
    settings: ServerSettings
    plans: PlanCache
    metrics: Metrics
    jobs: JobRunner
    """Not running yet when it is made: whoever mounts the routes starts and stops it."""
    inspections: InspectionQueue
    probe_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_PROBES))
    """What /health and /metrics run in, so that they answer while all other threads are taken."""
    search_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_SEARCHES))
    """What waits for an embedder, so that a slow one takes no thread of others."""
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """The model's name in the API, as it stands in every answer."""
        return self.engine.info.name


def assemble(
    engine: Engine,
    registry: Registry,
    settings: ServerSettings,
    *,
    load: Callable[[], int] | None = None,
    alive: Callable[[], bool] = lambda: True,
) -> Serving:
    """Joins the parts: a plan cache over the registry, jobs, and metrics over all of them.

    The engine's model takes the name that it is served under, and the registry is read for it.
    `load` counts the sequences that run
    or wait, where the engine's own figures do not; `alive` says whether the engine still runs,
    where it may end by itself.
    """
    engine.info = engine.info.served_as(_served_name(engine, settings))
    registry = registry.for_model(engine.info)
    metrics = Metrics(name_limit=settings.metric_names)
    policy = settings.spec_policy
    plans = plans_of(
        engine,
        registry,
        size=settings.plan_cache_size,
        observe_compile=metrics.plan_compile.observe,
        policy=policy,
    )
    jobs = JobRunner(
        engine,
        registry,
        builtin_kinds(
            hub(settings.max_hub_bytes) if settings.hub_imports else {},
            policy,
            captures=settings.captures,
            embedder=settings.asked_embedder,
            labeller=settings.asked_labeller,
        ),
        settings.job_limits,
        load=load,
        alive=alive,
        ended=metrics.job,
    )
    inspections = InspectionQueue(settings.inspection_workers, settings.inspection_queue)
    metrics.watch(engine, plans, registry, inspections)
    return Serving(engine, registry, settings, plans, metrics, jobs, inspections)


def _served_name(engine: Engine, settings: ServerSettings) -> str:
    """The name for clients: a model loaded from a folder of this machine goes by its last part."""
    name = settings.served_name or engine.info.name
    return bare_name(name) if settings.served_name is None and os.path.isdir(name) else name


async def _of_request(request: Request) -> Serving:
    # A plain function would be run in a thread, for which each request would wait.
    serving: Serving = request.app.state.steer
    return serving


ServingDep = Annotated[Serving, Depends(_of_request)]
