"""Inspection over HTTP: one route for each of `steer.inspection.METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from steer.inspection import METHODS, Inspection
from steer.inspection.method import Picture
from steer.inspection.state_file import StateFile
from steer_server.http.content_type import require_json
from steer_server.http.disconnect import while_connected
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

_PNG = "image/png"
_BYTES = "application/octet-stream"
Format = Annotated[
    Literal["json", "png"] | None,
    Query(description="png draws a heat map, as does 'Accept: image/png'"),
]


def make_router(methods: Sequence[Inspection]) -> APIRouter:
    """A route for each of `methods`."""
    router = APIRouter(
        prefix="/v1/inspect",
        tags=["inspection"],
        dependencies=[Depends(require_json)],
        route_class=SteerRoute,
    )
    for method in methods:
        _add_route(router, method)
    return router


def _add_route(router: APIRouter, method: Inspection) -> None:
    """`POST /v1/inspect/…`; the method's request and summary are those of the document."""

    async def run(
        body: Any, request: Request, serving: ServingDep, format: Format = None
    ) -> Response:
        call = partial(
            method.run, serving.engine, body, plans=serving.plans, library=serving.registry
        )
        if method.file is not None and _BYTES in request.headers.get("accept", ""):
            made = partial(
                method.file, serving.engine, body, plans=serving.plans, library=serving.registry
            )
            return await while_connected(request, lambda: _file(serving, made))
        png = _wants_png(request, format)
        return await while_connected(
            request, lambda: serving.inspections.run(lambda: _answer(call, method.draw, png))
        )

    run.__name__, run.__doc__ = f"run_{method.name}", method.summary
    run.__annotations__["body"] = method.request
    path = f"/{method.name.replace('_', '-')}"
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": method.result, "content": {_PNG: {}}}
    }
    if method.file is not None:
        responses[200]["content"][_BYTES] = {"schema": {"type": "string", "format": "binary"}}
    router.post(path, responses=responses)(run)


def _wants_png(request: Request, format: Literal["json", "png"] | None) -> bool:
    if format is not None:
        return format == "png"
    return _PNG in request.headers.get("accept", "")


def _answer(run: Callable[[], BaseModel], draw: Callable[[Any], Picture], png: bool) -> Response:
    """The result of `run` as JSON or as a picture."""
    if png:
        return Response(draw(run()).png(), media_type=_PNG)
    return Response(run().model_dump_json(exclude_none=True), media_type="application/json")


async def _file(serving: Serving, make: Callable[[], StateFile]) -> Response:
    """The file that `make` gives, sent while it is read. What prevents it is answered as an error
    until the first piece is there."""

    def begun() -> tuple[StateFile, bytes]:
        file = make()
        return file, next(file.pieces)

    file, first = await serving.inspections.run(begun)
    return StreamingResponse(
        chain([first], file.pieces),
        media_type=_BYTES,
        headers={
            "content-length": str(file.size),
            "content-disposition": 'attachment; filename="states.safetensors"',
        },
    )


router = make_router(METHODS)
