"""What vLLM's server has beside generation: models with profiles, and what Steer can do here.

Adapters (LoRA) and profiles are both asked for as a model. `<model>:<profile>` is a profile,
whatever the model: vLLM's own, or an adapter that it serves. So no adapter may be called like that.
"""

from __future__ import annotations

import json
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.openai.models import api_router as theirs
from vllm.entrypoints.serve import create_error_response

from steer.errors import UnknownModel, Unsupported
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


def served(models: Any, name: str) -> bool:
    """Whether vLLM knows a model or an adapter `name`; `models` is its `OpenAIServingModels`."""
    return bool(models.is_base_model(name)) or name in models.lora_requests


def keep_apart(models: Any) -> None:
    """Refuses adapters with names of profiles, those that are loaded later as well.

    Raises `Unsupported` for one that is loaded already.
    """
    for name in models.lora_requests:
        if (clash := _clash(models, name)) is not None:
            raise Unsupported(clash, code="adapter_name")
    load = models.load_lora_adapter

    async def load_lora_adapter(request: Any, *args: Any, **named: Any) -> Any:
        clash = _clash(models, request.lora_name)
        if clash is not None:
            return create_error_response(message=clash, err_type="InvalidUserInput")
        return await load(request, *args, **named)

    models.load_lora_adapter = load_lora_adapter


def _clash(models: Any, name: str) -> str | None:
    """What is wrong with an adapter called `name`."""
    model, _, profile = name.rpartition(":")
    if model and served(models, model):
        return (
            f"the adapter {name!r} has the name of the profile {profile!r} of the model {model!r}: "
            "load it under a name without ':'"
        )
    mine = [other for other in models.lora_requests if other.rpartition(":")[0] == name]
    if mine:
        return (
            f"the adapter {mine[0]!r}, which is loaded, would have the name of a profile of the "
            f"adapter {name!r}: load this one under another name"
        )
    return None


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
