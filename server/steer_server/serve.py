"""From settings to a running server."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from steer.engines.base import Engine
from steer.engines.transformers.checkpoints.shipped import add_shipped
from steer.errors import SteerError, Unsupported
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.banner import banner, example
from steer_server.http.origin import is_loopback
from steer_server.http.patience import patient_protocol
from steer_server.settings import ServerSettings
from steer_server.state import Serving
from steer_server.vllm.launch import launch

Loader = Callable[[ServerSettings], Engine]


def _transformers(settings: ServerSettings) -> Engine:
    # Imported where it is used: loading transformers takes seconds.
    from steer.engines.transformers.engine import TransformersEngine  # noqa: PLC0415

    return TransformersEngine.load(settings.model, **settings.engine_options)


def _fake(settings: ServerSettings) -> Engine:
    from steer.engines.fake.engine import FakeEngine, fake_model  # noqa: PLC0415

    return FakeEngine(fake_model(name=settings.model), **settings.engine_options)


LOADERS: Mapping[str, Loader] = MappingProxyType({"transformers": _transformers, "fake": _fake})
"""The engines that this server runs itself. vLLM has a server of its own, which Steer joins."""

ENGINES = (*LOADERS, "vllm")


def load_engine(settings: ServerSettings) -> Engine:
    """The engine with its model; raises `Unsupported` for an engine that does not exist."""
    if settings.engine not in LOADERS:
        raise Unsupported(
            f"there is no engine {settings.engine!r}: use one of {', '.join(ENGINES)}",
            code="unknown_engine",
        )
    return LOADERS[settings.engine](settings)


def build(settings: ServerSettings) -> FastAPI:
    """Loads the engine, opens the registry with what is shipped for the model, makes the app."""
    registry = Registry.open(
        settings.registry,
        catalogue=settings.catalogue_url,
        max_upload_bytes=settings.max_upload_bytes,
    )
    add_shipped(registry, settings.model)
    return create_app(load_engine(settings), registry, settings)


def run(settings: ServerSettings, *, console: Console | None = None) -> None:
    """Serves until interrupted; running requests get `drain_seconds` to finish.

    vLLM has a server of its own, which takes the place of this process. Raises `SteerError` for
    what would serve other machines without a key.
    """
    refuse_open_door(settings, os.environ)
    if settings.engine == "vllm":
        launch(settings)
    log_requests()
    app = build(settings)
    # What has been loaded stays: looking for garbage in it would hold up every request.
    gc.collect()
    gc.freeze()
    try:
        Server(app, settings, console=console or Console()).run()
    finally:
        app.state.steer.registry.close()


def log_requests() -> None:
    """Lines of this server on stderr, whatever the command line has quieted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("steer").setLevel(logging.INFO)


def refuse_open_door(settings: ServerSettings, environment: Mapping[str, str]) -> None:
    """Raises `SteerError` where whoever reaches this machine's `host` could steer and upload."""
    has_key = settings.api_key is not None
    if settings.engine == "vllm":
        has_key |= bool(environment.get("VLLM_API_KEY"))
    if has_key or settings.insecure or is_loopback(settings.host):
        return
    raise SteerError(
        f"--host {settings.host} would serve every machine that reaches this one, without a key: "
        "give --api-key-file, or --insecure where something else keeps strangers out",
        code="no_key",
    )


class Server(uvicorn.Server):
    """uvicorn that prints the banner once it listens, with the port it really has."""

    def __init__(
        self, app: FastAPI, settings: ServerSettings, *, console: Console | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                http=patient_protocol(settings.patience_seconds),
                timeout_graceful_shutdown=settings.drain_seconds,
            )
        )
        self._serving: Serving = app.state.steer
        self._console = console

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._console is not None:
            self._console.print(banner(self._serving, self.url))
            # Outside the frame and on lines of its own, to be copied.
            self._console.print(
                example(self._serving, self.url), style="green", soft_wrap=True, highlight=False
            )

    @property
    def url(self) -> str:
        """Where the server listens; an open address is named by loopback."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        return f"http://{host}:{port}"
