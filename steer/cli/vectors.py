"""`steer vectors`: the registry's control vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit import file_errors, parse_layers
from steer.cli.local import RegistryOption, open_registry
from steer.cli.reporting import out, table_out

if TYPE_CHECKING:
    from steer.registry.entry import Entry

app = typer.Typer(help="List, add, show, remove, restore and export vectors.", no_args_is_help=True)

RefArgument = Annotated[str, typer.Argument(help="A name, or name@hash for one version.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_vectors(
    query: Annotated[str, typer.Argument(help="Part of a name or description.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    tag: Annotated[str | None, typer.Option(help="Only those with this tag.")] = None,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="What was removed and can be restored.")
    ] = False,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """List the vectors, the newest version of each."""
    with open_registry(registry) as library:
        entries = library.entries("vector", query=query, limit=limit, tag=tag, deleted=deleted)
    if as_json:
        typer.echo(json.dumps([described(entry) for entry in entries], indent=2))
        return
    from rich.table import Table

    table = Table()
    for heading in ("name", "version", "model", "width", "layers", "strength", "description"):
        table.add_column(heading)
    for entry in entries:
        card = entry.card
        table.add_row(
            entry.name,
            f"{entry.version} ({entry.sha256[:12]})",
            card.model or "–",
            str(card.width),
            ",".join(map(str, card.used_layers)),
            f"{card.default_strength:g}",
            card.description,
        )
    table_out().print(table)


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="safetensors or GGUF.")],
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="By default the file's name.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="The default layers, such as 2-5 or 1,3.")
    ] = None,
    layer_offset: Annotated[
        int | None, typer.Option(help="Added to every layer number in a foreign file.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="The default strength.")] = None,
    description: Annotated[str | None, typer.Option(help="A sentence for the card.")] = None,
    licence: Annotated[str | None, typer.Option(help="The licence for the card.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Register the vector in a file; the same content again changes nothing."""
    from steer.formats.options import ImportOptions

    options = ImportOptions(
        layer_offset=layer_offset,
        layers=None if layers is None else parse_layers(layers),
        strength=strength,
        description=description,
        licence=licence,
    )
    with open_registry(registry) as library:
        entry, created = library.import_file(file, kind="vector", name=name, options=options)
    state = f"version {entry.version}" if created else "already registered"
    out().print(f"{entry.id}: {state}", highlight=False)


@app.command("show")
def show(ref: RefArgument, registry: RegistryOption = None) -> None:
    """Print a vector's card, and all its versions, as JSON."""
    with open_registry(registry) as library:
        entry = library.entry("vector", ref)
        versions = library.versions("vector", entry.name)
    listed = [{"version": one.version, "id": one.id} for one in versions]
    typer.echo(json.dumps({**described(entry), "versions": listed}, indent=2, ensure_ascii=False))


@app.command("remove")
def remove(ref: RefArgument, registry: RegistryOption = None) -> None:
    """Remove a vector with all its versions, or with name@hash that version.

    It can be restored until `steer registry gc`.
    """
    with open_registry(registry) as library:
        entry = library.remove("vector", ref)
    out().print(f"removed {entry.id if '@' in ref else entry.name}", highlight=False)


@app.command("restore")
def restore(ref: RefArgument, registry: RegistryOption = None) -> None:
    """Bring back what was removed: a name with all its versions, or with name@hash that version."""
    with open_registry(registry) as library:
        entry = library.restore("vector", ref)
    out().print(f"restored {entry.id if '@' in ref else entry.name}", highlight=False)


@app.command("export")
def export(
    ref: RefArgument,
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="By default NAME.safetensors; .gguf writes GGUF."),
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """Write a vector to a file: safetensors with its card, or GGUF for llama.cpp and repeng."""
    from steer.formats.gguf_vector import write_gguf

    with open_registry(registry) as library:
        entry = library.entry("vector", ref)
        path = output or Path(f"{entry.name}.safetensors")
        with file_errors(path):
            if path.suffix == ".gguf":
                write_gguf(library.vector(ref), path)
            else:
                with library.content("vector", ref) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
    out().print(f"wrote {path}", highlight=False)


def described(entry: Entry) -> dict[str, Any]:
    """An entry as JSON."""
    return {
        "id": entry.id,
        "name": entry.name,
        "version": entry.version,
        "sha256": entry.sha256,
        "bytes": entry.size_bytes,
        "created_at": entry.created_at.isoformat(),
        "card": entry.card.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
