"""The application: every router over one engine, one registry and one set of settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from anyio import to_thread
from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from steer.engines.base import Engine
from steer.registry.registry import Registry
from steer_server.http import openai_errors
from steer_server.http.access_log import AccessLog
from steer_server.http.api_key import ApiKey, below_v1
from steer_server.http.body_limit import BodyLimit
from steer_server.http.document import document
from steer_server.http.origin import OwnPagesOnly
from steer_server.http.patience import StalledBody
from steer_server.http.request_id import RequestId
from steer_server.http.shutdown import AnswerCutOff
from steer_server.routes import (
    aliases,
    chat,
    completions,
    features,
    health,
    inspect_routes,
    job_files,
    job_requests,
    jobs,
    models,
    profiles,
    responses,
    validate,
)
from steer_server.routes.artefacts import artefact_routers, body_limit
from steer_server.settings import ServerSettings
from steer_server.state import assemble


def routers() -> list[APIRouter]:
    """All routers; they need a `Serving` at `app.state.steer`, and `openai_errors.install`."""
    return [
        chat.router,
        completions.router,
        responses.router,
        models.router,
        features.router,
        *artefact_routers(),
        aliases.router,
        profiles.router,
        validate.router,
        inspect_routes.router,
        job_requests.router,
        jobs.router,
        job_files.router,
        health.router,
    ]


def create_app(engine: Engine, registry: Registry, settings: ServerSettings) -> FastAPI:
    """The application. It starts the engine when it starts, and stops it when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = app.state.steer.jobs
        await to_thread.run_sync(engine.start)
        try:
            await to_thread.run_sync(jobs.start)
            yield
        finally:
            await to_thread.run_sync(jobs.stop)
            await to_thread.run_sync(engine.stop)

    app = FastAPI(
        title="Steer",
        version=_version(),
        description="Steering and inspection for LLM serving, behind an OpenAI-compatible API.",
        lifespan=lifespan,
    )
    app.state.steer = assemble(engine, registry, settings)
    for router in routers():
        app.include_router(router)
    openai_errors.install(app)
    needs_key = settings.api_key is not None
    app.openapi = partial(document, app, needs_key=needs_key)  # type: ignore[method-assign]
    app.add_middleware(BodyLimit, limit=partial(body_limit, settings))
    _add_doors(app, settings)
    return app


def _add_doors(app: FastAPI, settings: ServerSettings) -> None:
    """What a request passes before it is read; the last that is added is the first it meets."""
    if settings.api_key is not None:
        keys = (settings.api_key.get_secret_value(),)
        app.add_middleware(ApiKey, keys=lambda _: keys, guarded=below_v1)
    else:
        app.add_middleware(
            OwnPagesOnly,
            hosts=(*settings.allowed_hosts, settings.host),
            origins=settings.allowed_origins,
        )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(StalledBody, seconds=settings.patience_seconds)
    app.add_middleware(AnswerCutOff)
    if settings.access_log:
        app.add_middleware(AccessLog)
    app.add_middleware(RequestId)


def _version() -> str:
    try:
        return version("steer-llm")
    except PackageNotFoundError:
        return "0.0.0"
