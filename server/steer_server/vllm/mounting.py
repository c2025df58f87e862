"""Steer's routes and state on vLLM's application."""

from __future__ import annotations

import atexit
import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from steer.engines.base import TokenReadout
from steer.engines.transformers.checkpoints.found import known_model
from steer.engines.transformers.checkpoints.shipped import add_shipped
from steer.engines.vllm.front.ends import known_ends
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.front.twins import compared
from steer.jobs import JobRunner
from steer.registry.registry import Registry
from steer_server.http.body_limit import BodyLimit
from steer_server.http.document import complete
from steer_server.routes import (
    aliases,
    features,
    inspect_routes,
    job_files,
    job_requests,
    jobs,
    profiles,
    validate,
)
from steer_server.routes.artefacts import artefact_routers, body_limit
from steer_server.settings import ServerSettings
from steer_server.state import assemble
from steer_server.vllm import generation, listing
from steer_server.vllm.fetching.arrived_readouts import ArrivedReadouts
from steer_server.vllm.figures import expose
from steer_server.vllm.receipt_guard import ReceiptGuard
from steer_server.vllm.settings import settings_of
from steer_server.vllm.steer_fields import planned_text

_PATIENCE = 5.0
"""Seconds in which a job must come to its next step when the server stops; none waits for it
longer."""


def routers() -> list[APIRouter]:
    """Everything that Steer adds to vLLM's server; all of it is below `/v1`, which vLLM's
    `--api-key` guards."""
    return [
        generation.router,
        listing.router,
        features.router,
        *artefact_routers(),
        aliases.router,
        profiles.router,
        validate.router,
        inspect_routes.router,
        job_requests.router,
        jobs.router,
        job_files.router,
    ]


def mount(app: FastAPI, router: APIRouter) -> None:
    """Adds the routes of `router` in front of all others, and takes away those they replace."""
    theirs = list(app.router.routes)
    app.include_router(router)
    ours = [route for route in app.router.routes if not any(route is one for one in theirs)]
    replaced = {operation for route in ours for operation in _operations(route)}
    kept = [route for route in theirs if not replaced.intersection(_operations(route))]
    app.router.routes[:] = [*ours, *kept]


def add_bounds(app: FastAPI, environment: Mapping[str, str]) -> None:
    """No route of this server reads a body without end.

    Raises `SpecError` for settings in `environment` that are wrong.
    """
    settings = settings_of(environment, model="", served_name="")
    app.add_middleware(BodyLimit, limit=partial(body_limit, settings))


def describe(app: FastAPI, environment: Mapping[str, str]) -> None:
    """Completes what vLLM's OpenAPI document says of Steer's own routes."""
    arguments = getattr(app.state, "args", None)
    keys = getattr(arguments, "api_key", None) or environment.get("VLLM_API_KEY")
    theirs = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            complete(theirs(), needs_key=bool(keys), ours=_is_ours)
        return theirs()

    app.openapi = described  # type: ignore[method-assign]


def _is_ours(path: str) -> bool:
    return path.startswith(("/v1/steering/", "/v1/inspect/", "/v1/jobs"))


def _operations(route: BaseRoute) -> set[tuple[str, str]]:
    """Path and method of an API route; empty for mounts and the like."""
    if not isinstance(route, APIRoute):
        return set()
    return {(route.path, method) for method in route.methods or ()}


async def serve(client: Any, state: Any, environment: Mapping[str, str]) -> None:
    """Puts a `Serving` and a `ReceiptGuard` into the application's state.

    Raises what prevents it.
    """
    listing.keep_apart(state.openai_serving_models)
    served = state.openai_serving_models.base_model_paths[0].name
    settings = settings_of(
        environment, model=client.vllm_config.model_config.model, served_name=served
    )
    registry = await to_thread.run_sync(_registry, settings)
    # The engine's own requests fetch their receipts themselves, and go past the guard. Its
    # tokenizer is its own as well: those of Hugging Face may not be used by two threads at once.
    plain = SimpleNamespace(
        generate=client.generate,
        collective_rpc=client.collective_rpc,
        engine_core=client.engine_core,
        vllm_config=client.vllm_config,
    )
    engine = await VllmEngine.of_client(plain, copy.deepcopy(client.get_tokenizer()))
    # Its workers know only the name that it is served under.
    known = known_model(settings.model)
    engine.info = replace(engine.info, origin=known.own_name if known else settings.model)
    # vLLM's requests are its own: Steer's figures count those that are steered or read.
    load = client.output_processor.get_num_unfinished_requests
    state.steer = assemble(engine, registry, settings, load=load, alive=lambda: not client.errored)
    arrived = ArrivedReadouts()
    arrived.watch(client.output_processor)
    state.steer_guard = ReceiptGuard(
        client,
        state.steer.metrics,
        partial(planned_text, state.steer, engine.tickets),
        engine.ends - known_ends(client.vllm_config, engine.tokenizer),
        tokenizer=copy.deepcopy(client.get_tokenizer()),
        readout_values=settings.readout_values,
        compare=partial(_compared, plain, engine),
        width=engine.info.d_model,
        arrived=arrived,
        watches_all=bool(settings.detectors),
    )
    expose(state.steer.metrics.registry)
    # A worker's first call waits for this loop, so that it is started from another thread.
    await to_thread.run_sync(state.steer.jobs.start)
    _stop_first(client, state.steer.jobs)


async def _compared(
    client: Any,
    engine: VllmEngine,
    key: str,
    choice: int,
    prompt: tuple[int, ...],
    said: list[int],
) -> list[TokenReadout]:
    twin = engine.twins.of(key, choice, prompt, said)
    return await compared(client, client.generate, twin)


def _stop_first(client: Any, jobs: JobRunner) -> None:
    """Has `jobs` stopped before vLLM's engine, while their calls are still answered.

    vLLM's server has no hook at its end, but shuts its client down from a thread, and nothing can
    run without the engine afterwards.
    """
    shutdown = client.shutdown

    def stopping(*arguments: Any, **named: Any) -> None:
        jobs.stop(patience=_PATIENCE)
        shutdown(*arguments, **named)

    client.shutdown = stopping
    # Where the loop ends in another way, a job in the middle of a call would not come back: it is
    # queued again for the next server.
    atexit.register(jobs.stop, patience=0.0)


def _registry(settings: ServerSettings) -> Registry:
    registry = Registry.open(
        settings.registry,
        catalogue=settings.catalogue_url,
        max_upload_bytes=settings.max_upload_bytes,
    )
    add_shipped(registry, settings.model)
    return registry
