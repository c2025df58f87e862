"""Routes that answer their own errors, whatever application they are mounted on."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from steer.errors import SteerError
from steer_server.http.openai_errors import answer


class SteerRoute(APIRoute):
    """Gives OpenAI's body to what is wrong with a request; other failures are the application's."""

    answered: ClassVar[tuple[type[Exception], ...]] = (
        SteerError,
        RequestValidationError,
        HTTPException,
        ClientDisconnect,
    )

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except self.answered as error:
                return await answer(request, error)

        return handler
