"""Connections on which no whole request comes are closed, so that they cannot pile up.

uvicorn closes what is silent after an answer. Before the first request, and in the middle of one,
it waits for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from anyio import fail_after
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol


def patient_protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection whose next request's head takes longer than
    `seconds` from its beginning."""

    class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()  # a request is under way; its body is `StalledBody`'s
            elif self._waiting is None:
                self._waiting = self.loop.call_later(seconds, self._give_up)

        def _forget(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _give_up(self) -> None:
            self._waiting = None
            self.transport.close()

    return PatientProtocol


class StalledBody:
    """ASGI middleware: answers 408 where the next piece of a body takes longer than `seconds`."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        whole = False

        async def hurried() -> Message:
            nonlocal whole
            if whole:
                return await receive()  # waits for the client to leave
            try:
                with fail_after(self._seconds):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"no more of the request's body came for {self._seconds:g} s",
                    headers={"connection": "close"},
                ) from None
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, hurried, send)
