"""What a request hears that the server's end cuts off.

A server that stops waits for its requests, and cancels those that outlast its patience. uvicorn
would answer them with its own text of an internal error, or break a stream off in the middle.
"""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer_server.http.openai_errors import error_body, refuse

_MESSAGE = "the server is shutting down and could not finish this request: send it again"
_CODE = "shutting_down"
_EVENTS = b"text/event-stream"


class AnswerCutOff:
    """ASGI middleware: a cancelled request is answered with 503; a stream of events ends with one
    of the error. Anything else that has begun is broken off, so that its client sees it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head: Message | None = None

        async def noted(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if head is None:
                headers = {"connection": "close", "retry-after": "1"}
                response = refuse(scope, _MESSAGE, status=503, code=_CODE, headers=headers)
                await response(scope, receive, send)
            elif dict(head["headers"]).get(b"content-type", b"").startswith(_EVENTS):
                await send({"type": "http.response.body", "body": _last_event(scope["path"])})
            else:
                raise


def _last_event(path: str) -> bytes:
    error = json.dumps(error_body(_MESSAGE, status=503, code=_CODE))
    if path.endswith("/completions"):
        return f"data: {error}\n\ndata: [DONE]\n\n".encode()
    # Other streams name their events.
    return f"event: error\ndata: {error}\n\n".encode()
