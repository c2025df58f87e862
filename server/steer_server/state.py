"""What every route works with, and how it gets it.

The routers know nothing else about the application they are mounted on: whoever mounts them puts a
`Serving` at `app.state.steer`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.plan_cache import PlanCache
from steer.registry.registry import Registry
from steer_server.metrics import Metrics
from steer_server.settings import ServerSettings


@dataclass(frozen=True)
class Serving:
    """One served model with its artefacts, settings and figures."""

    engine: Engine
    registry: Registry
    settings: ServerSettings
    plans: PlanCache
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.settings.served_name or self.engine.info.name


def assemble(engine: Engine, registry: Registry, settings: ServerSettings) -> Serving:
    """Joins the parts: a plan cache over the registry, and metrics over all of them."""
    metrics = Metrics(name_limit=settings.metric_names)
    plans = plans_of(
        engine,
        registry,
        size=settings.plan_cache_size,
        observe_compile=metrics.plan_compile.observe,
        strength_limit=settings.strength_limit,
    )
    metrics.watch(engine, plans, registry)
    return Serving(engine, registry, settings, plans, metrics)


def _of_request(request: Request) -> Serving:
    serving: Serving = request.app.state.steer
    return serving


ServingDep = Annotated[Serving, Depends(_of_request)]
