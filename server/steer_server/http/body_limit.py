"""No request body is read beyond a limit, whatever its headers claim."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer_server.http.openai_errors import refuse

_DIGITS = 20


class BodyLimit:
    """ASGI middleware: answers 413 for bodies longer than `limit(path)` bytes.

    Bodies that announce their length are refused before they are read; others when they pass it.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[str], int]) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        # No more digits than Python reads: thousands of them are too large as well.
        if not declared.isdigit() or len(declared) > _DIGITS or int(declared) > limit:
            await _refuse(limit, scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, _counted(receive, limit), noted)
        except _TooLong:
            # Read by another middleware, outside of what answers errors.
            if started:
                raise
            await _refuse(limit, scope, receive, send)


class _TooLong(HTTPException):
    """The body has passed the limit; whoever answers errors answers this one."""


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    # The server takes the rest of the body off the connection, and forgets it as it comes: to close
    # it in the middle of a client's sending would lose the answer.
    response = refuse(scope, _sentence(limit), status=413, code="request_too_large")
    await response(scope, receive, send)


def _counted(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _TooLong(413, _sentence(limit))
        return message

    return counted


def _sentence(limit: int) -> str:
    return f"the request body is longer than the limit of {limit} bytes: send less"
