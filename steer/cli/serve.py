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
        typer.Option(
            envvar="STEER_API_KEY_FILE",
            help="A file that holds the key which clients must send; without it, none.",
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure/--secure",
            help="Whether to serve other machines without a key.",
            show_default="secure",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A name that a server without a key answers to; may be repeated."
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="A web page's origin that may use a server without a key; may be repeated.",
        ),
    ] = None,
    max_upload_mib: Annotated[
        int | None,
        typer.Option(
            min=1, help="The largest file that may be uploaded, in MiB.", show_default="512"
        ),
    ] = None,
    max_hub_mib: Annotated[
        int | None,
        typer.Option(
            min=1, help="The largest artefact fetched from the hub, in MiB.", show_default="512"
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences that run in one batch; 64, or vLLM's own number for vllm."
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=256,
            help="Tokens, padding included, that running requests may hold in the cache "
            "(transformers).",
            show_default="two fifths of the memory that is free",
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
        bool | None,
        typer.Option(
            "--inline-vectors/--no-inline-vectors",
            help="Whether requests may carry vectors of their own.",
            show_default="inline-vectors",
        ),
    ] = None,
    hub_imports: Annotated[
        bool | None,
        typer.Option(
            "--hub-imports/--no-hub-imports",
            help="Whether clients may have artefacts fetched from the hub.",
            show_default="hub-imports",
        ),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A model that embeds labels, http://HOST/v1#model=NAME, with its key in "
            "STEER_EMBEDDER_KEY.",
        ),
    ] = None,
    labeller: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A model that makes and judges labels, likewise, with its key in "
            "STEER_LABELLER_KEY.",
        ),
    ] = None,
    strength_limit: Annotated[
        StrengthLimitChoice | None,
        typer.Option(
            help="What happens to strengths outside a vector's calibrated range.",
            show_default="off",
        ),
    ] = None,
    job_workers: Annotated[
        int | None,
        typer.Option(
            min=0, max=64, help="Jobs that run at a time; 0 only queues them.", show_default="1"
        ),
    ] = None,
    job_duty: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1.0,
            help="The share of the engine's time for jobs while requests run.",
            show_default="0.03",
        ),
    ] = None,
    access_log: Annotated[
        bool | None,
        typer.Option(
            "--access-log/--no-access-log",
            help="Whether each request is logged.",
            show_default="access-log",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, with steering.

    Every setting also has an environment variable (docs/http.md), which an option overrides.
    """
    if engine == "transformers":
        quiet()
    from pydantic import SecretStr

    from steer.registry.location import chosen_catalogue
    from steer_server.serve import run
    from steer_server.settings import settings_from

    key, catalogue = read_key(api_key_file), chosen_catalogue(os.environ)
    chosen = {
        "insecure": insecure,
        "allowed_hosts": allowed_host and tuple(allowed_host),
        "allowed_origins": allowed_origin and tuple(allowed_origin),
        "max_upload_bytes": None if max_upload_mib is None else max_upload_mib << 20,
        "max_hub_bytes": None if max_hub_mib is None else max_hub_mib << 20,
        "allow_inline_vectors": inline_vectors,
        "hub_imports": hub_imports,
        "embedder": embedder,
        "labeller": labeller,
        "strength_limit": None if strength_limit is None else strength_limit.value,
        "job_workers": job_workers,
        "job_duty": job_duty,
        "access_log": access_log,
    }
    settings = settings_from(
        os.environ,
        host=host,
        port=port,
        model=model,
        served_name=served_name,
        engine=engine,
        engine_options=_options(engine, engine_option, rows, cache_tokens, slots, device, dtype),
        registry=registry_folder(registry),
        catalogue=None if catalogue is None else SecretStr(catalogue),
        api_key=None if key is None else SecretStr(key),
        **_set(chosen),
    )
    run(settings)


def _options(
    engine: str,
    given: list[str] | None,
    rows: int | None,
    cache_tokens: int | None,
    slots: int | None,
    device: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """What the engine is told, in its own words; raises `SpecError` for what is not its own."""
    if engine == "vllm":
        others = {"--cache-tokens": cache_tokens, "--slots": slots, "--device": device}
        for name, value in others.items():
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
        own = {"rows": rows, "cache_tokens": cache_tokens, "slots": slots}
        return _set({**own, "device": device, "dtype": dtype})
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
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SteerError(
            f"the key file {str(path)!r} cannot be read: {error.strerror}", code="no_such_file"
        ) from error
    except UnicodeDecodeError:
        key = "\0"
    if not key:
        raise SteerError(f"the key file {str(path)!r} is empty", code="empty_key")
    if not key.isprintable() or " " in key:
        raise SteerError(
            f"the key file {str(path)!r} does not hold a key: it is one line of printable ASCII "
            "characters without spaces, as a header can carry it",
            code="invalid_key",
        )
    return key
