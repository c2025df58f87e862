"""Every answer has an `X-Request-ID`: the client's own, or one made here.

It stands in error bodies and log lines as well, so that a client, a proxy and this server can speak
of the same request.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"

_SAFE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What is echoed: it goes into headers and logs as it is."""

_current: ContextVar[str | None] = ContextVar("request_id", default=None)


def request_id() -> str | None:
    """The id of the request that is being answered; None outside of one."""
    return _current.get()


class RequestId:
    """ASGI middleware, in front of all others.

    Guarantees: at most 128 characters that need no quoting; an id of the client that is anything
    else is replaced, in what the application sees too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        name = given if given is not None and _SAFE.fullmatch(given) else uuid.uuid4().hex
        if given is not None and given != name:
            rest = [(key, value) for key, value in scope["headers"] if key != HEADER.encode()]
            scope["headers"] = [*rest, (HEADER.encode(), name.encode())]

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(HEADER, name)
            await send(message)

        # Never reset: a request has a task of its own, and what fails here is answered outside.
        _current.set(name)
        await self._app(scope, receive, named)
