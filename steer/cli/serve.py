"""`steer serve`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    model_name,
    quiet,
    registry_folder,
)
from steer.errors import SpecError, SteerError


class StrengthLimitChoice(StrEnum):
    off = "off"
    refuse = "refuse"
    cap = "cap"


def serve(
    model: ModelOption = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 picks a free one.")
    ] = 8000,
    engine: Annotated[
        str, typer.Option(help="transformers, vllm (vLLM's own server), or fake (no model).")
    ] = "transformers",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An argument for vLLM's server, such as max_model_len=4096; may be repeated.",
        ),
    ] = None,
    registry: RegistryOption = None,
    served_name: Annotated[
        str | None, typer.Option(help="The model's name in the API; by default its own.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A file that holds the key which clients must send; without it, none."),
    ] = None,
    max_upload_mib: Annotated[
        int, typer.Option(min=1, help="The largest file that may be uploaded, in MiB.")
    ] = 512,
    max_hub_mib: Annotated[
        int, typer.Option(min=1, help="The largest artefact fetched from the hub, in MiB.")
    ] = 512,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences that run in one batch; 64, or vLLM's own number for vllm."
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Different specs that may run at the same time; 256, or as many as rows for vllm.",
        ),
    ] = None,
    inline_vectors: Annotated[
        bool, typer.Option(help="Whether requests may carry vectors of their own.")
    ] = True,
    strength_limit: Annotated[
        StrengthLimitChoice,
        typer.Option(
            envvar="STEER_STRENGTH_LIMIT",
            help="What happens to strengths outside a vector's calibrated range.",
        ),
    ] = StrengthLimitChoice.off,
    job_workers: Annotated[
        int, typer.Option(min=0, max=64, help="Jobs that run at a time; 0 only queues them.")
    ] = 1,
    job_duty: Annotated[
        float,
        typer.Option(
            min=0.001, max=1.0, help="The share of the engine's time for jobs while requests run."
        ),
    ] = 0.03,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, with steering."""
    if engine == "transformers":
        quiet()
    from pydantic import SecretStr

    from steer.registry.location import chosen_catalogue
    from steer_server.serve import run
    from steer_server.settings import ServerSettings

    key, catalogue = read_key(api_key_file), chosen_catalogue(os.environ)
    settings = ServerSettings(
        host=host,
        port=port,
        model=model,
        served_name=served_name or model_name(model),
        engine=engine,
        engine_options=_options(engine, engine_option, rows, slots, device, dtype),
        registry=registry_folder(registry),
        catalogue=None if catalogue is None else SecretStr(catalogue),
        api_key=None if key is None else SecretStr(key),
        max_upload_bytes=max_upload_mib << 20,
        max_hub_bytes=max_hub_mib << 20,
        allow_inline_vectors=inline_vectors,
        strength_limit=strength_limit.value,
        job_workers=job_workers,
        job_duty=job_duty,
    )
    run(settings)


def _options(
    engine: str,
    given: list[str] | None,
    rows: int | None,
    slots: int | None,
    device: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """What the engine is told, in its own words; raises `SpecError` for what is not its own."""
    if engine == "vllm":
        for name, value in (("--slots", slots), ("--device", device)):
            if value is not None:
                raise SpecError(
                    f"{name} is not for vLLM, which decides it itself: leave it out",
                    code="invalid_option",
                )
        own = {"max_num_seqs": rows, "dtype": dtype}
        return {**_set(own), **dict(_pair(text) for text in given or ())}
    if given:
        raise SpecError(
            f"--engine-option {given[0]!r} is for the engine vllm alone", code="invalid_option"
        )
    if engine == "transformers":
        return _set({"rows": rows, "slots": slots, "device": device, "dtype": dtype})
    return {}


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise SpecError(
            f"--engine-option {text!r} is not of the form NAME=VALUE", code="invalid_option"
        )
    return name, value


def read_key(path: Path | None) -> str | None:
    """The key in a file; raises `SteerError` for a file without one."""
    if path is None:
        return None
    try:
        key = path.read_text().strip()
    except OSError as error:
        raise SteerError(
            f"the key file {str(path)!r} cannot be read: {error.strerror}", code="no_such_file"
        ) from error
    if not key:
        raise SteerError(f"the key file {str(path)!r} is empty", code="empty_key")
    return key
