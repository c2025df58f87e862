"""Adapters (LoRA) beside profiles: both are asked for as a model, and must not share a name.

`<model>:<profile>` is a profile, whatever the model: vLLM's own, or an adapter that it serves. So
no adapter may be called like that.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.serve import create_error_response

from steer.errors import Unsupported


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
