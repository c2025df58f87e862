"""Bearer authentication with one key, as OpenAI's clients send it."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from steer_server.http.openai_errors import error_response


class ApiKey:
    """ASGI middleware: everything below `/v1` needs `Authorization: Bearer <key>`.

    /health and /metrics stay open for probes and scrapers.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                response = error_response(
                    "this server needs its API key: send it as 'Authorization: Bearer <key>'",
                    status=401,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
