"""`steer aliases` and `steer tags`: more names for an artefact, and words on it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from steer.artefacts.kinds import ArtefactKind
from steer.cli.local import RegistryOption, open_registry
from steer.cli.reporting import out, table_out

aliases = typer.Typer(help="List, set and remove aliases.", no_args_is_help=True)
tags = typer.Typer(help="Show, set and unset tags.", no_args_is_help=True)


KindOption = Annotated[ArtefactKind, typer.Option("--kind", "-k", help="What kind of artefact.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@aliases.command("list")
def list_aliases(as_json: JsonOption = False, registry: RegistryOption = None) -> None:
    """List all aliases."""
    with open_registry(registry) as library:
        found = library.aliases()
    if as_json:
        rows = [{"kind": one.kind, "name": one.name, "target": one.ref} for one in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table("alias", "kind", "stands for")
    for alias in found:
        table.add_row(alias.name, alias.kind, alias.ref)
    table_out().print(table)


@aliases.command("set")
def set_alias(
    name: Annotated[str, typer.Argument(help="The alias.")],
    target: Annotated[
        str, typer.Argument(help="A name (its newest version, whichever that is) or name@hash.")
    ],
    kind: KindOption = "vector",
    registry: RegistryOption = None,
) -> None:
    """Make a name stand for an artefact; an alias of that name is moved."""
    with open_registry(registry) as library:
        alias = library.set_alias(kind, name, target)
    out().print(f"{alias.name} -> {alias.ref}", highlight=False)


@aliases.command("remove")
def remove_alias(
    name: Annotated[str, typer.Argument(help="The alias.")],
    kind: KindOption = "vector",
    registry: RegistryOption = None,
) -> None:
    """Remove an alias, and nothing else."""
    with open_registry(registry) as library:
        library.unset_alias(kind, name)
    out().print(f"removed the alias {name}", highlight=False)


NameArgument = Annotated[str, typer.Argument(help="The artefact's name.")]
TagArguments = Annotated[list[str], typer.Argument(help="One or more tags.")]


@tags.command("show")
def show_tags(
    name: NameArgument, kind: KindOption = "vector", registry: RegistryOption = None
) -> None:
    """Print a name's tags."""
    with open_registry(registry) as library:
        _print_tags(library.change_tags(kind, name))


@tags.command("set")
def set_tags(
    name: NameArgument,
    words: TagArguments,
    kind: KindOption = "vector",
    registry: RegistryOption = None,
) -> None:
    """Put tags on a name; prints all that it has then."""
    with open_registry(registry) as library:
        _print_tags(library.change_tags(kind, name, add=words))


@tags.command("unset")
def unset_tags(
    name: NameArgument,
    words: TagArguments,
    kind: KindOption = "vector",
    registry: RegistryOption = None,
) -> None:
    """Take tags off a name; prints those that it has left."""
    with open_registry(registry) as library:
        _print_tags(library.change_tags(kind, name, remove=words))


def _print_tags(held: tuple[str, ...]) -> None:
    out().print(" ".join(held) or "no tags", highlight=False)
