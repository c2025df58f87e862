"""`steer registry`: the registry as a whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from steer.artefacts.kinds import KINDS, ArtefactKind
from steer.cli.local import RegistryOption, open_registry
from steer.cli.reporting import err, out, progress_bar, table_out
from steer.errors import FileFormatError, SteerError

app = typer.Typer(
    help="Search, count, clean, move and migrate a registry as a whole.", no_args_is_help=True
)

DAY = 86_400.0
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KindOption = Annotated[ArtefactKind | None, typer.Option("--kind", "-k", help="Only this kind.")]


@app.command("stats")
def stats(as_json: JsonOption = False, registry: RegistryOption = None) -> None:
    """Print how much is registered."""
    with open_registry(registry) as library:
        found = library.stats()
        aliases = len(library.aliases())
    named: dict[str, int] = {row.plural: found.artefacts.get(row.name, 0) for row in KINDS}
    figures = {
        **named,
        "profiles": found.profiles,
        "aliases": aliases,
        "bytes": found.blob_bytes,
        "removed_bytes": found.removed_bytes,
    }
    _show(figures, as_json)


@app.command("search")
def search(
    text: Annotated[str, typer.Argument(help="Part of a name, description or tag.")] = "",
    kind: KindOption = None,
    model: Annotated[str | None, typer.Option(help="Only for this model.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Only of this width.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="What was removed and can be restored.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    offset: Annotated[int, typer.Option(min=0, help="Leave out so many.")] = 0,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Find artefacts of all kinds; all that is given must fit."""
    with open_registry(registry) as library:
        entries = library.entries(
            kind,
            query=text,
            model=model,
            width=width,
            tag=tag,
            deleted=deleted,
            limit=limit,
            offset=offset,
        )
        tags = {
            row.name: library.tags(row.name, [e.name for e in entries if e.kind == row.name])
            for row in KINDS
        }
    rows: list[dict[str, Any]] = [
        {
            "kind": entry.kind,
            "id": entry.id,
            "version": entry.version,
            "model": entry.card.model,
            "width": entry.card.width,
            "tags": list(tags[entry.kind].get(entry.name, ())),
            "description": entry.card.description,
        }
        for entry in entries
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table("kind", "id", "version", "model", "width", "tags", "description")
    for row in rows:
        values = {**row, "tags": " ".join(row["tags"]), "model": row["model"] or "–"}
        table.add_row(*map(str, values.values()))
    table_out().print(table)


@app.command("gc")
def gc(
    grace_days: Annotated[
        float, typer.Option(min=0, help="Keep what was removed in the last so many days.")
    ] = 7.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")
    ] = False,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Delete for good what was removed, and leftovers; never what anything uses."""
    with open_registry(registry) as library:
        done = library.collect_garbage(grace_seconds=grace_days * DAY, dry_run=dry_run)
    _show(asdict(done), as_json)


@app.command("migrate")
def migrate(registry: RegistryOption = None) -> None:
    """Bring the catalogue's schema up to date, as every command and server does at its start."""
    from steer.registry.catalogue.schema import HEAD

    with open_registry(registry):
        pass
    out().print(f"the catalogue has the schema {HEAD}", highlight=False)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="The archive to write; - is standard output.")],
    registry: RegistryOption = None,
) -> None:
    """Write the whole registry to one tar file."""
    with open_registry(registry) as library:
        total = library.stats()
        size = total.blob_bytes + total.removed_bytes
        with _written(file) as target, progress_bar("exporting", size) as progress:
            done = library.export_archive(target, progress)
    # Not to standard output, which may be the archive.
    err().print(
        f"{done.versions} versions, {done.profiles} profiles and {done.aliases} aliases, "
        f"{done.blobs} blobs with {done.blob_bytes} bytes; what lies beside SAEs (surveys, "
        "findings, labels that are not their own) is not in it",
        highlight=False,
    )


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An archive of `export`; - is standard input.")],
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Add what an archive has and the registry has not; nothing here is changed."""
    with (
        _readable(file) as (source, size),
        open_registry(registry) as library,
        progress_bar("importing", size) as progress,
    ):
        done = library.import_archive(source, progress)
    for reason in done.kept:
        err().print(f"left out: {reason}", highlight=False, markup=False)
    _show({**asdict(done), "kept": len(done.kept)}, as_json)


@contextmanager
def _written(file: Path) -> Iterator[BinaryIO]:
    """A file that appears when it is whole, or standard output."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise SteerError(
            f"{str(file)!r} cannot be written: {error.strerror}", code="not_written"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _readable(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    if str(file) == "-":
        yield sys.stdin.buffer, 0
        return
    try:
        stream = file.open("rb")
    except OSError as error:
        raise FileFormatError(
            f"{str(file)!r} cannot be read: {error.strerror}", code="no_such_file"
        ) from error
    with stream:
        yield stream, file.stat().st_size


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        out().print(f"{name.replace('_', ' ')}: {value}", highlight=False)
