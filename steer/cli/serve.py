"""`steer serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from steer.errors import SteerError


def serve(
    model: ModelOption = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 picks a free one.")
    ] = 8000,
    engine: Annotated[str, typer.Option(help="transformers, or fake (no model).")] = "transformers",
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
    rows: Annotated[int, typer.Option(min=1, help="Sequences that run in one batch.")] = 64,
    slots: Annotated[
        int, typer.Option(min=1, help="Different specs that may run at the same time.")
    ] = 256,
    inline_vectors: Annotated[
        bool, typer.Option(help="Whether requests may carry vectors of their own.")
    ] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, with steering."""
    if engine == "transformers":
        quiet()
    from pydantic import SecretStr

    from steer_server.serve import run
    from steer_server.settings import ServerSettings

    options = {"rows": rows, "slots": slots, "device": device, "dtype": dtype}
    key = _key(api_key_file)
    settings = ServerSettings(
        host=host,
        port=port,
        model=model,
        served_name=served_name or model_name(model),
        engine=engine,
        engine_options=options if engine == "transformers" else {},
        registry=registry_folder(registry),
        api_key=None if key is None else SecretStr(key),
        max_upload_bytes=max_upload_mib << 20,
        allow_inline_vectors=inline_vectors,
    )
    run(settings)


def _key(path: Path | None) -> str | None:
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
