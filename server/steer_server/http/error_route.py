"""Routes that read their own bodies and answer their own errors, whatever application they are
mounted on."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from steer.errors import SteerError
from steer_server.http.json_body import read_body
from steer_server.http.openai_errors import answer

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class SteerRoute(APIRoute):
    """Gives OpenAI's body to what is wrong with a request; other failures are the application's.

    JSON bodies are parsed and validated with bounds, and beside the event loop.
    """

    answered: ClassVar[tuple[type[Exception], ...]] = (
        SteerError,
        RequestValidationError,
        HTTPException,
        ClientDisconnect,
    )

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().handle(scope, receive, send)
        except HTTPException as error:
            if error.status_code == 405:
                # A route knows its own methods; others of the same path have more of them.
                error.headers = {"allow": ", ".join(_methods(scope))}
            raise

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field

        async def handler(request: Request) -> Response:
            try:
                if field is not None:
                    request = await read_body(request, field)
                return await handle(request)
            except self.answered as error:
                return await answer(request, error)

        return handler


def _methods(scope: Scope) -> list[str]:
    """What the application knows at this path."""
    place = {key: scope[key] for key in ("type", "path", "root_path", "headers") if key in scope}
    return [
        method
        for method in _METHODS
        if any(
            route.matches({**place, "method": method})[0] is Match.FULL
            for route in scope["app"].router.routes
        )
    ]
