"""Inspection over HTTP: one route for each method in `steer.inspection`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from steer.inspection.activations import ActivationsRequest, ActivationsResult, activations
from steer.inspection.heatmap import (
    HeatMap,
    activations_heat_map,
    lens_heat_map,
    patchscope_heat_map,
)
from steer.inspection.logit_lens import LogitLensRequest, LogitLensResult, logit_lens
from steer.inspection.patchscope import PatchscopeRequest, PatchscopeResult, patchscope
from steer.spec import SteeringSpec
from steer_server.generation.steering import check_inline
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(
    prefix="/v1/inspect",
    tags=["inspection"],
    dependencies=[Depends(require_json)],
    route_class=SteerRoute,
)

_PNG = "image/png"
_R = TypeVar("_R", bound=BaseModel)
Format = Annotated[
    Literal["json", "png"] | None,
    Query(description="png draws a heat map, as does 'Accept: image/png'"),
]


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": {_PNG: {}}}}


@router.post("/patchscope", responses=_answers(PatchscopeResult))
async def run_patchscope(
    body: PatchscopeRequest, request: Request, serving: ServingDep, format: Format = None
) -> Response:
    """Puts hidden states of one prompt into another, and lets the model say what they mean."""
    _check(serving, body.source.steering, "/source/steering")
    run = partial(patchscope, serving.engine, body, plans=serving.plans)
    return await _answer(run, patchscope_heat_map, _wants_png(request, format))


@router.post("/logit-lens", responses=_answers(LogitLensResult))
async def run_logit_lens(
    body: LogitLensRequest, request: Request, serving: ServingDep, format: Format = None
) -> Response:
    """What each layer would say next, by the final norm and output matrix, or a tuned lens."""
    _check(serving, body.steering, "/steering")
    run = partial(logit_lens, serving.engine, body, plans=serving.plans, library=serving.registry)
    return await _answer(run, lens_heat_map, _wants_png(request, format))


@router.post("/activations", responses=_answers(ActivationsResult))
async def run_activations(
    body: ActivationsRequest, request: Request, serving: ServingDep, format: Format = None
) -> Response:
    """Norms, states, readings along registered vectors, and the active features of an SAE."""
    _check(serving, body.steering, "/steering")
    run = partial(activations, serving.engine, body, library=serving.registry, plans=serving.plans)
    return await _answer(run, activations_heat_map, _wants_png(request, format))


def _check(serving: Serving, spec: SteeringSpec | None, at: str) -> None:
    if spec is not None:
        check_inline(serving, spec, at=at)


def _wants_png(request: Request, format: Literal["json", "png"] | None) -> bool:
    if format is not None:
        return format == "png"
    return _PNG in request.headers.get("accept", "")


async def _answer(run: Callable[[], _R], draw: Callable[[_R], HeatMap], png: bool) -> Response:
    """The result of `run` as JSON or as a picture, computed in a worker thread."""
    if png:
        return Response(await to_thread.run_sync(lambda: draw(run()).png()), media_type=_PNG)
    text = await to_thread.run_sync(lambda: run().model_dump_json(exclude_none=True))
    return Response(text, media_type="application/json")
