"""Who may steer on vLLM's server.

vLLM asks for its key below `/v1` and a few more prefixes. Routes that generate lie elsewhere too
(`/invocations`), and run a profile as well. Without a key, a web page of any origin may send forms.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from steer_server.http.api_key import ApiKey
from steer_server.http.origin import OwnPagesOnly

_OPEN = ("/health", "/ping", "/metrics", "/version", "/load")
"""What probes and scrapers ask for, with any method; it changes nothing."""

_STEERED = ("/v1/steering", "/v1/inspect", "/v1/jobs")


def add_doors(app: FastAPI) -> None:
    """Where vLLM's server has a key, whatever runs or changes something needs it; where it has
    none, Steer's routes take requests of its own pages alone. `state.steer_keys` holds the keys."""
    app.add_middleware(OwnPagesWithoutKey)
    app.add_middleware(ApiKey, keys=_keys, guarded=_acts)


def keys_of(args: Namespace, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys that vLLM takes, by its own rule: its arguments before the variable."""
    given = getattr(args, "api_key", None) or [environment.get("VLLM_API_KEY")]
    return tuple(key for key in given if key)


class OwnPagesWithoutKey:
    """ASGI middleware: `OwnPagesOnly`, by settings that are there only once the server has started.

    vLLM tells browsers itself which pages may read its answers (`--allowed-origins`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._guarded: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving = getattr(scope["app"].state, "steer", None) if scope["type"] == "http" else None
        if serving is None or _keys(scope):
            await self._app(scope, receive, send)
            return
        if self._guarded is None:
            settings = serving.settings
            self._guarded = OwnPagesOnly(
                self._app, settings.allowed_hosts, settings.allowed_origins, _STEERED
            )
        await self._guarded(scope, receive, send)


def _acts(scope: Scope) -> bool:
    """Whether a request may run or change something; what reads is left to vLLM's own rule."""
    path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and path not in _OPEN


def _keys(scope: Scope) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(scope["app"].state, "steer_keys", ())
    return found
