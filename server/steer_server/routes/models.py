"""GET /v1/models: the model, and each profile as a model of its own."""

from __future__ import annotations

from fastapi import APIRouter
from openai.types import Model
from pydantic import BaseModel

from steer_server.generation.steering import unknown_model
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=SteerRoute)


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: str = "list"
    data: list[Model]


@router.get("", response_model_exclude_unset=True)
def list_models(serving: ServingDep) -> ModelList:
    """The served model, then `<model>:<profile>` for each profile that serves it."""
    return ModelList(object="list", data=[_model(serving, name) for name in _listed(serving)])


@router.get("/{model:path}", response_model_exclude_unset=True)
def show_model(model: str, serving: ServingDep) -> Model:
    """One of them."""
    if model not in _listed(serving):
        raise unknown_model(serving, model)
    return _model(serving, model)


def _listed(serving: Serving) -> list[str]:
    profiles = serving.registry.profiles()
    return [serving.model_name, *(f"{serving.model_name}:{one.name}" for one in profiles)]


def _model(serving: Serving, name: str) -> Model:
    return Model(id=name, created=serving.started, object="model", owned_by="steer")
