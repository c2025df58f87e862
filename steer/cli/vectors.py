"""`steer vectors`: the registry's control vectors and, with `--kind`, its other artefacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from steer.artefacts.kinds import NAMED
from steer.cli.fit.saving import file_errors
from steer.cli.local import NamesOption, RegistryOption, open_registry
from steer.cli.names import KindOption
from steer.cli.options import command, keyword
from steer.cli.reporting import err, nothing_yet, out, table_out
from steer.errors import FileFormatError, SteerError
from steer.model import parse_layers

if TYPE_CHECKING:
    from steer.artefacts.kinds import ArtefactKind
    from steer.formats.exporting import ExportFormat
    from steer.formats.options import ImportOptions
    from steer.registry.entry import Entry
    from steer.registry.registry import Registry

app = typer.Typer(
    help="List, add, import, convert, show, remove, restore and export vectors, and, with --kind, "
    "other artefacts.",
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
        "llama-cpp-generator (one late), easysteer, blocks, hidden-states, persona-vectors, "
        "refusal-direction or assistant-axis; of a pyreft folder loreft or direft.",
    ),
]
PositionOption = Annotated[
    int | None, typer.Option(help="Which token position of mean_diffs.pt, such as -1.")
]
SiteOption = Annotated[
    str | None,
    typer.Option(help="Where the rows were read and belong, such as resid_pre or mlp_out."),
]
ExperimentOption = Annotated[
    str | None, typer.Option(help="Which experiment of a capping configuration.")
]
READING = (
    keyword("layers", LayersOption, None),
    keyword("layer_offset", OffsetOption, None),
    keyword("source", SourceOption, None),
    keyword("position", PositionOption, None),
    keyword("site", SiteOption, None),
    keyword("experiment", ExperimentOption, None),
)
"""What may be said of how a foreign file is read; the names are those of `ImportOptions`."""

StrengthOption = Annotated[float | None, typer.Option(help="The default strength.")]
DescriptionOption = Annotated[str | None, typer.Option(help="A sentence for the card.")]
LicenceOption = Annotated[str | None, typer.Option(help="The licence for the card.")]
CARD = (
    keyword("strength", StrengthOption, None),
    keyword("description", DescriptionOption, None),
    keyword("licence", LicenceOption, None),
)
NAME = keyword("name", NameOption, None)
REGISTRY = keyword("registry", RegistryOption, None)


@app.command("list")
def list_vectors(
    query: Annotated[str, typer.Argument(help="Part of a name or description.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    tag: Annotated[str | None, typer.Option(help="Only those with this tag.")] = None,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="What was removed and can be restored.")
    ] = False,
    kind: KindOption = "vector",
    as_json: JsonOption = False,
    model: NamesOption = None,
    registry: RegistryOption = None,
) -> None:
    """List the vectors, or artefacts of another kind, the newest version of each."""
    with open_registry(registry, model) as library:
        entries = library.entries(kind, query=query, limit=limit, tag=tag, deleted=deleted)
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
        option = "" if kind == "vector" else f" --kind {kind}"
        nothing_yet(NAMED[kind].plural, f"steer vectors add{option}")


FileArgument = Annotated[Path, typer.Argument(help="safetensors, GGUF, .npz, .npy, .svec or .pt.")]


def _add(values: dict[str, Any]) -> None:
    options = _options(values, *READING, *CARD)
    with open_registry(values["registry"]) as library:
        entry, created = library.import_file(
            values["file"], kind=values["kind"], name=values["name"], options=options
        )
    _show_added(entry, created)


app.command("add")(
    command(
        _add,
        (
            keyword("file", FileArgument),
            NAME,
            *READING,
            *CARD,
            keyword("kind", KindOption, "vector"),
            REGISTRY,
        ),
        summary="Register the vector in a file; the same content again changes nothing.",
    )
)


PlaceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A file, a folder, or hf://organisation/repository/path@revision."
    ),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Take what is on the hub from the local cache only.")
]
MostOption = Annotated[
    int, typer.Option(min=1, help="The most that is downloaded from the hub, in MiB.")
]


def _import(values: dict[str, Any]) -> None:
    options = _options(values, *READING, *CARD)
    path, name, origin = _located(
        values["place"], values["name"], values["offline"], values["max_hub_mib"] << 20
    )
    with open_registry(values["registry"]) as library:
        entry, created = library.import_file(
            path, name=name, options=replace(options, origin=origin)
        )
    _show_added(entry, created)


app.command("import")(
    command(
        _import,
        (
            keyword("place", PlaceArgument),
            NAME,
            *READING,
            *CARD,
            keyword("offline", OfflineOption, False),
            keyword("max_hub_mib", MostOption, 512),
            REGISTRY,
        ),
        summary="Register a vector, adapter, map, SAE or lens from a file, a folder or the hub.",
    )
)


PickleArgument = Annotated[
    Path,
    typer.Argument(
        help="A pickle or joblib file: of steering-vectors, of scikit-learn, of a module of torch, "
        "or of tensors and NumPy arrays."
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="By default FILE with .safetensors.")
]


def _convert(values: dict[str, Any]) -> None:
    from steer.cli.fit.saving import write_file
    from steer.formats.vectors.pickles import convert_pickle

    file: Path = values["file"]
    if not file.is_file():
        raise FileFormatError(f"there is no file {str(file)!r}", code="no_such_file")
    vector = convert_pickle(file, _options(values, *READING))
    path = values["output"] or file.with_suffix(".safetensors")
    write_file(path, vector.to_bytes())
    out().print(
        f"wrote {path}: {vector.card.site}, layers {', '.join(map(str, vector.card.layers))}",
        highlight=False,
    )


app.command("convert")(
    command(
        _convert,
        (
            keyword("file", PickleArgument),
            keyword("output", OutputOption, None),
            *READING,
        ),
        summary="Turn a pickled vector or linear probe, or NumPy arrays in a .pt file, into "
        "safetensors without unpickling.",
    )
)


@app.command("show")
def show(
    ref: RefArgument,
    kind: KindOption = "vector",
    model: NamesOption = None,
    registry: RegistryOption = None,
) -> None:
    """Print a vector's card, and all its versions, as JSON."""
    with open_registry(registry, model) as library:
        entry = library.entry(kind, ref)
        versions = library.versions(kind, entry.name)
    listed = [{"version": one.version, "id": one.id} for one in versions]
    typer.echo(json.dumps({**described(entry), "versions": listed}, indent=2, ensure_ascii=False))


def _with_named(
    act: Callable[[Registry, ArtefactKind, str], Entry], done: str
) -> Callable[[dict[str, Any]], None]:
    """A command that does something with what a name means, and tells that it is `done`."""

    def run(values: dict[str, Any]) -> None:
        ref = values["ref"]
        with open_registry(values["registry"], values["model"]) as library:
            entry = act(library, values["kind"], ref)
        out().print(f"{done} {entry.id if '@' in ref else entry.name}", highlight=False)

    return run


_NAME = (
    keyword("ref", RefArgument),
    keyword("kind", KindOption, "vector"),
    keyword("model", NamesOption, None),
    keyword("registry", RegistryOption, None),
)
app.command("remove")(
    command(
        _with_named(lambda library, kind, ref: library.remove(kind, ref), "removed"),
        _NAME,
        summary="Remove a vector with all its versions, those for one model, or with name@hash "
        "that version.\n\nIt can be restored until `steer registry gc`.",
    )
)
app.command("restore")(
    command(
        _with_named(lambda library, kind, ref: library.restore(kind, ref), "restored"),
        _NAME,
        summary="Bring back what was removed: a name with all its versions, or with name@hash "
        "that version.",
    )
)


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
    kind: KindOption = "vector",
    model: NamesOption = None,
    registry: RegistryOption = None,
) -> None:
    """Write a vector to a file: safetensors with its card, or GGUF for llama.cpp and repeng.

    Other kinds of artefacts come as safetensors, with all their layers.
    """
    from steer.formats.exporting import SUFFIXES

    chosen = format or ("gguf" if output and output.suffix == ".gguf" else "safetensors")
    if chosen not in SUFFIXES:
        raise SteerError(
            f"--format {chosen!r} is not known; known are {', '.join(SUFFIXES)}",
            code="invalid_option",
            param="/format",
        )
    with open_registry(registry, model) as library:
        entry = library.entry(kind, ref)
        path = output or Path(f"{entry.name}{SUFFIXES[chosen]}")
        warnings = _exported(library, entry, path, chosen, layers)
    out().print(f"wrote {path}", highlight=False)
    for warning in warnings:
        err().print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)


def _exported(
    library: Registry, entry: Entry, path: Path, format: ExportFormat, layers: str | None
) -> tuple[str, ...]:
    """Writes the artefact to `path`; what readers of that file will not know of it."""
    from steer.cli.fit.saving import write_file
    from steer.formats.exporting import check_exported, export_vector

    if format == "safetensors" and layers is None:
        # Loaded and not copied, so that a damaged file is noticed.
        artefact = library.load(NAMED[entry.kind].artefact_class(), entry.id)
        write_file(path, artefact.to_bytes())
        return ()
    check_exported(entry.kind)
    vector = library.vector(entry.id)
    if layers is not None:
        vector = vector.on_layers(parse_layers(layers))
    with file_errors(path):
        return export_vector(vector, path, format)


def _options(values: Mapping[str, Any], *said: Parameter) -> ImportOptions:
    """What the options `said` say of a file. Raises `SteerError`."""
    from steer.formats.options import ImportOptions

    given = {one.name: values[one.name] for one in said}
    if given["layers"] is not None:
        given["layers"] = parse_layers(given["layers"])
    return ImportOptions(**given)


def _located(
    place: str, name: str | None, offline: bool, max_bytes: int
) -> tuple[Path, str | None, str | None]:
    """The path that SOURCE leads to, the name to register it by, and what the card says of it."""
    from steer.formats.hub import SCHEME, fetch, parse_hub_ref

    if not place.startswith(SCHEME):
        return Path(place), name, None
    ref = parse_hub_ref(place)
    fetched = fetch(ref, offline=offline, max_bytes=max_bytes)
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
