"""`steer profiles`: saved steering specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.artefacts.arming import ArmedDetectors
from steer.cli.local import NamesOption, RegistryOption, open_registry
from steer.cli.reporting import nothing_yet, out, table_out
from steer.cli.steering import read_json, read_spec
from steer.errors import SteerError, pointer, quoted

app = typer.Typer(help="List, add, show and remove saved specs.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The profile's name.")]


@app.command("list")
def list_profiles(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    model: NamesOption = None,
    registry: RegistryOption = None,
) -> None:
    """List the profiles, of all models or those that serve one."""
    with open_registry(registry, model) as library:
        profiles = library.profiles()
    if as_json:
        dumped = [p.model_dump(mode="json", by_alias=True, exclude_none=True) for p in profiles]
        typer.echo(json.dumps(dumped, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table()
    for heading in ("name", "model", "interventions", "description"):
        table.add_column(heading)
    for profile in profiles:
        kinds = ", ".join(item.kind for item in profile.spec.interventions)
        table.add_row(profile.name, profile.model or "all", kinds, profile.description)
    table_out().print(table)
    if not profiles:
        nothing_yet("profiles")


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="JSON: a spec, or a profile with name and spec.")],
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="By default the file's own, or its name.")
    ] = None,
    description: Annotated[str | None, typer.Option(help="What it does, in a sentence.")] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Replace names by name@hash of what they mean now.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The model it is for; by default the file's own, or every model."
        ),
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """Save a spec under a name, in place of one with the same name and model."""
    from steer.registry.profiles import Profile
    from steer.spec import check_name

    spec, about = read_spec(file), read_json(file)
    if "spec" not in about:
        about = {}
    chosen = str(name or about.get("name") or file.stem)
    told = description if description is not None else str(about.get("description", ""))
    try:
        check_name(chosen)
    except ValueError as error:
        raise SteerError(str(error), code="invalid_name", param="/name") from None
    if len(told) > 4096:
        raise SteerError("a description has at most 4096 characters", code="invalid_option")
    own = str(about["model"]) if model is None and about.get("model") else None
    if own is not None and len(own) > 512:
        raise SteerError("the name of a model has at most 512 characters", code="invalid_option")
    profile = Profile(name=chosen, spec=spec, detectors=_armed(about), description=told, model=own)
    with open_registry(registry, model) as library:
        library.put_profile(profile, pin=pin)
    out().print(f"saved {chosen}", highlight=False)


def _armed(about: dict[str, Any]) -> ArmedDetectors:
    """The detectors of the profile in a file."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ArmedDetectors).validate_python(about.get("detectors", []))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SteerError(
            f"{first['msg']}; got {quoted(first['input'])}",
            code="invalid_value",
            param=pointer("detectors", *first["loc"]),
        ) from None


@app.command("show")
def show(name: NameArgument, model: NamesOption = None, registry: RegistryOption = None) -> None:
    """Print a profile as JSON."""
    with open_registry(registry, model) as library:
        profile = library.profile(name)
    typer.echo(profile.model_dump_json(indent=2, by_alias=True, exclude_none=True))


@app.command("remove")
def remove(name: NameArgument, model: NamesOption = None, registry: RegistryOption = None) -> None:
    """Remove a profile, of all models or of one."""
    with open_registry(registry, model) as library:
        library.remove_profile(name)
    out().print(f"removed {name}", highlight=False)
