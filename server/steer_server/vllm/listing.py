"""What vLLM's server has beside generation: models with profiles, and what Steer can do here."""

from __future__ import annotations

import json
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.openai.models import api_router as theirs

from steer.errors import UnknownModel
from steer_server.http.error_route import SteerRoute
from steer_server.routes import health
from steer_server.state import Serving, ServingDep

router = APIRouter(route_class=SteerRoute)


@router.get("/v1/models", tags=["models"])
async def list_models(raw_request: Request, serving: ServingDep) -> Response:
    """vLLM's models, adapters included, and `<model>:<profile>` for each that serves this one."""
    listed = json.loads(bytes((await theirs.show_available_models(raw_request)).body))
    listed["data"] += await _profiles(serving, listed["data"])
    return JSONResponse(listed)


@router.get("/v1/models/{model:path}", tags=["models"])
async def show_model(model: str, raw_request: Request, serving: ServingDep) -> Response:
    """One of them."""
    listed = json.loads(bytes((await list_models(raw_request, serving)).body))
    for card in listed["data"]:
        if card["id"] == model:
            return JSONResponse(card)
    raise UnknownModel(
        f"the model {model!r} does not exist: GET /v1/models lists those that do",
        param="/model",
    )


@router.get("/v1/steering/health", tags=["operation"])
async def show_health(serving: ServingDep) -> dict[str, Any]:
    """Whether the engine answers, and how busy steering is; vLLM's own is at /health."""
    return await health.health(serving)


@router.get("/v1/steering/capabilities", tags=["operation"])
def show_capabilities(serving: ServingDep) -> dict[str, Any]:
    """What this engine can really do with this model; anything else is refused by name."""
    able = health.capabilities(serving)
    # The other limits of Steer's own server are vLLM's to set here.
    able["limits"] = {"max_upload_bytes": serving.settings.max_upload_bytes}
    return able


async def _profiles(serving: Serving, cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base = next(card for card in cards if card["id"] == serving.model_name)
    found = await to_thread.run_sync(serving.registry.profiles)
    return [
        {
            **base,
            "id": f"{serving.model_name}:{profile.name}",
            "owned_by": "steer",
            "parent": serving.model_name,
        }
        for profile in found
    ]
