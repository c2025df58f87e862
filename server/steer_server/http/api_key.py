"""Bearer authentication, as OpenAI's clients send it."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from steer_server.http.openai_errors import refuse


class ApiKey:
    """ASGI middleware: a request that is `guarded` needs `Authorization: Bearer <key>` with one of
    the `keys`; where there are none, it needs nothing."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Callable[[Scope], Collection[str]],
        guarded: Callable[[Scope], bool],
    ) -> None:
        self._app, self._keys, self._guarded = app, keys, guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guarded(scope):
            keys = self._keys(scope)
            if keys and not _holds(scope, keys):
                response = refuse(
                    scope,
                    "this server needs its API key: send it as 'Authorization: Bearer <key>'",
                    status=401,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def below_v1(scope: Scope) -> bool:
    """What needs a key on Steer's own server: /health and /metrics stay open for probes."""
    return bool(scope["path"].startswith("/v1"))


def _holds(scope: Scope, keys: Collection[str]) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = given.partition(b" ")
    # Every key is compared, so that the time tells nothing about them.
    matches = [hmac.compare_digest(token.strip(), key.encode()) for key in keys]
    return scheme.lower() == b"bearer" and any(matches)
