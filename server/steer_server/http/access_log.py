"""One line for each request: who asked for what, how it ended, and how long it took.

Neither queries nor bodies are written: they hold prompts.
"""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("steer.access")

_QUIET = ("/health", "/metrics")
"""What probes and scrapers ask for every few seconds; logged where it fails."""

_LONGEST_PATH = 200


class AccessLog:
    """ASGI middleware, in front of all that may refuse a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})  # of this request, for all that copy the scope
        started = time.perf_counter()
        status = 500  # what is answered where nothing was

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if status >= 400 or scope["path"] not in _QUIET:
                _write(scope, status, time.perf_counter() - started)


def _write(scope: Scope, status: int, seconds: float) -> None:
    client = scope.get("client")
    # As it was sent, which cannot hold a line's end.
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace").partition("?")[0]
    code = scope.get("state", {}).get("error_code")
    log.info(
        "%s %s %s %d%s %.1f ms",
        client[0] if client else "-",
        scope["method"],
        path[:_LONGEST_PATH],
        status,
        f" {code}" if code else "",
        1000 * seconds,
    )
