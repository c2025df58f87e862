"""What every `steer fit` command shares: options, and where its results go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.local import model_name, open_registry
from steer.cli.reporting import out
from steer.errors import SteerError
from steer.model import bare_name, parse_layers
from steer.spec import Site, check_name

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector, LowRankAdapter
    from steer.fit.data.prompt import Positions, Prompt
    from steer.registry.registry import Registry

NameOption = Annotated[
    str | None, typer.Option("--name", "-n", help="The result's name; by default the file's.")
]
DescriptionOption = Annotated[str, typer.Option(help="A sentence for the card.")]
LicenceOption = Annotated[str, typer.Option(help="The licence for the card.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="The file to write, or for several results the folder; by default NAME.safetensors.",
    ),
]
RegisterOption = Annotated[
    bool, typer.Option("--register", help="Put it into the registry, not into a file.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts or pairs in one batch.")]


def keep(
    found: Mapping[str, ControlVector | LowRankAdapter],
    output: Path | None,
    register: bool,
    registry: str | None,
) -> Callable[[], None]:
    """Registers or writes every artefact under its name; a function that says so afterwards."""
    lines = []
    if register:
        with open_registry(registry) as folder:
            for name, artefact in found.items():
                entry, created = folder.add(name, artefact)
                lines.append(f"{'registered' if created else 'already registered'}: {entry.id}")
    else:
        for name, artefact in found.items():
            path = Path(f"{name}.safetensors")
            if output is not None:
                path = output if len(found) == 1 else output / path
            if len(found) > 1:
                with file_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, artefact.to_bytes())
            lines.append(f"wrote {path}")
    return lambda: out().print("\n".join(lines), highlight=False)


def stored_name(name: str | None, data: Path | None) -> str:
    """The name to keep a result under: the one given, or the file's; raises `SteerError`."""
    try:
        return check_name(name or (data.stem if data is not None else ""))
    except ValueError as error:
        raise SteerError(str(error), code="invalid_name") from None


def site_named(site: str) -> Site:
    """`site` as one that exists; raises `SteerError`."""
    from steer.spec import SITES

    for known in SITES:
        if known == site:
            return known
    raise SteerError(
        f"{site!r} is not a site: use one of {', '.join(SITES)}", code="unsupported_site"
    )


def position(text: str) -> Positions:
    """A position as the command line spells it: a name, or an index."""
    for name in ("last", "mean", "response", "subject"):
        if text == name:
            return name
    try:
        return int(text)
    except ValueError:
        raise SteerError(
            f"{text!r} is no position: use last, mean, response, subject or an index",
            code="invalid_option",
        ) from None


def given_prompt(text: str, plain: bool) -> Prompt:
    """A prompt from the command line: JSON where it is JSON, else a user's message or, `plain`, a
    text."""
    from steer.fit.data.prompt import parse_prompt

    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, list | dict):
        return parse_prompt(value, "the command line", "a prompt")
    return text if plain else [{"role": "user", "content": text}]


def registered_vectors(folder: Registry, model: str) -> dict[str, ControlVector]:
    """The registry's vectors for `model`."""
    return {
        entry.name: folder.vector(entry.name)
        for entry in folder.entries("vector", limit=10_000)
        if entry.card.model is None or bare_name(entry.card.model) == model_name(model)
    }


def layers_or_all(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else parse_layers(text)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Raises what goes wrong inside while writing `path` as a `SteerError`."""
    try:
        yield
    except OSError as error:
        raise SteerError(
            f"{str(path)!r} cannot be written: {error.strerror}", code="not_written"
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Writes `data`; raises `SteerError` where that is impossible."""
    with file_errors(path):
        path.write_bytes(data)
