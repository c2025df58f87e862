"""`steer vectors`: the registry's control vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from steer.cli.fit.contrast import file_errors
from steer.cli.local import RegistryOption, open_registry
from steer.cli.reporting import err, nothing_yet, out, table_out
from steer.errors import FileFormatError, SteerError
from steer.model import parse_layers

if TYPE_CHECKING:
    from steer.formats.options import ImportOptions
    from steer.registry.entry import Entry

app = typer.Typer(
    help="List, add, import, convert, show, remove, restore and export vectors.",
    no_args_is_help=True,
)

RefArgument = Annotated[str, typer.Argument(help="A name, or name@hash for one version.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NameOption = Annotated[str | None, typer.Option("--name", "-n", help="By default the file's name.")]
LayersOption = Annotated[str | None, typer.Option(help="The default layers, such as 2-5 or 1,3.")]
OffsetOption = Annotated[
    int | None, typer.Option(help="Added to every layer number in a foreign file.")
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Who wrote the file, and so how it counts layers: repeng, llama-cpp, "
        "llama-cpp-generator (one late), easysteer, blocks, hidden-states, persona-vectors or "
        "refusal-direction.",
    ),
]
PositionOption = Annotated[
    int | None, typer.Option(help="Which token position of mean_diffs.pt, such as -1.")
]
StrengthOption = Annotated[float | None, typer.Option(help="The default strength.")]
DescriptionOption = Annotated[str | None, typer.Option(help="A sentence for the card.")]
LicenceOption = Annotated[str | None, typer.Option(help="The licence for the card.")]


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
    if not (entries or query or tag or deleted):
        nothing_yet("vectors")


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="safetensors, GGUF, .npz, .svec or .pt.")],
    name: NameOption = None,
    layers: LayersOption = None,
    layer_offset: OffsetOption = None,
    source: SourceOption = None,
    position: PositionOption = None,
    strength: StrengthOption = None,
    description: DescriptionOption = None,
    licence: LicenceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Register the vector in a file; the same content again changes nothing."""
    options = _options(layers, layer_offset, source, position, strength, description, licence)
    with open_registry(registry) as library:
        entry, created = library.import_file(file, kind="vector", name=name, options=options)
    _show_added(entry, created)


@app.command("import")
def import_(
    place: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder, or hf://organisation/repository/path@revision.",
        ),
    ],
    name: NameOption = None,
    layers: LayersOption = None,
    layer_offset: OffsetOption = None,
    source: SourceOption = None,
    position: PositionOption = None,
    strength: StrengthOption = None,
    description: DescriptionOption = None,
    licence: LicenceOption = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Take what is on the hub from the local cache only.")
    ] = False,
    registry: RegistryOption = None,
) -> None:
    """Register a vector, adapter, SAE or tuned lens from a file, a folder or the hub."""
    options = _options(layers, layer_offset, source, position, strength, description, licence)
    path, name, origin = _located(place, name, offline)
    options = replace(options, origin=origin)
    with open_registry(registry) as library:
        entry, created = library.import_file(path, name=name, options=options)
    _show_added(entry, created)


@app.command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="A pickle of the steering-vectors package.")],
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="By default FILE with .safetensors.")
    ] = None,
) -> None:
    """Turn a pickled SteeringVector into safetensors, without unpickling it."""
    from steer.cli.fit.contrast import write_file
    from steer.formats.vectors.steering_vectors_pickle import read_steering_vector

    if not file.is_file():
        raise FileFormatError(f"there is no file {str(file)!r}", code="no_such_file")
    vector = read_steering_vector(file)
    path = output or file.with_suffix(".safetensors")
    write_file(path, vector.to_bytes())
    out().print(
        f"wrote {path}: {vector.card.site}, layers {', '.join(map(str, vector.card.layers))}",
        highlight=False,
    )


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
        typer.Option("--out", "-o", help="By default NAME with the format's suffix."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="safetensors (with its card), safetensors-plain or gguf; by default gguf if OUT "
            "ends in .gguf, else safetensors.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these, such as 1-5 or 2,3; GGUF has no block 0.")
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """Write a vector to a file: safetensors with its card, or GGUF for llama.cpp and repeng."""
    from steer.formats.exporting import SUFFIXES, export_vector

    chosen = format or ("gguf" if output and output.suffix == ".gguf" else "safetensors")
    if chosen not in SUFFIXES:
        raise SteerError(
            f"--format {chosen!r} is not known; known are {', '.join(SUFFIXES)}",
            code="invalid_option",
            param="/format",
        )
    with open_registry(registry) as library:
        entry = library.entry("vector", ref)
        path = output or Path(f"{entry.name}{SUFFIXES[chosen]}")
        with file_errors(path):
            vector = library.vector(ref)
            if layers is not None:
                vector = vector.on_layers(parse_layers(layers))
            warnings = export_vector(vector, path, chosen)
    out().print(f"wrote {path}", highlight=False)
    for warning in warnings:
        err().print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)


def _options(
    layers: str | None,
    layer_offset: int | None,
    source: str | None,
    position: int | None,
    strength: float | None,
    description: str | None,
    licence: str | None,
) -> ImportOptions:
    from steer.formats.options import ImportOptions

    return ImportOptions(
        layer_offset=layer_offset,
        layers=None if layers is None else parse_layers(layers),
        source=source,
        position=position,
        strength=strength,
        description=description,
        licence=licence,
    )


def _located(place: str, name: str | None, offline: bool) -> tuple[Path, str | None, str | None]:
    """The path that SOURCE leads to, the name to register it by, and what the card says of it."""
    from steer.formats.hub import SCHEME, fetch, parse_hub_ref

    if not place.startswith(SCHEME):
        return Path(place), name, None
    ref = parse_hub_ref(place)
    fetched = fetch(ref, offline=offline)
    return fetched.path, name or ref.stem, fetched.origin


def _show_added(entry: Entry, created: bool) -> None:
    state = f"version {entry.version}" if created else "already registered"
    kind = "" if entry.kind == "vector" else f" ({entry.kind})"
    out().print(f"{entry.id}{kind}: {state}", highlight=False)


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
