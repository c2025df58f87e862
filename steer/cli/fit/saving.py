"""What `steer fit` commands share: options, where results go, and going on with what was ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.local import open_registry
from steer.cli.reporting import err, out
from steer.errors import SteerError
from steer.spec import check_name

if TYPE_CHECKING:
    from pydantic import BaseModel

    from steer.engines.base import Engine
    from steer.engines.journal import JournaledEngine
    from steer.fit.requests.request import Artefact

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="The file to write, or for several results the folder; by default NAME.safetensors.",
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw what was measured into this file (PNG).")
]
RegisterOption = Annotated[
    bool, typer.Option("--register", help="Put it into the registry, not into a file.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts or pairs in one batch.")]
StatesOption = Annotated[
    Path | None,
    typer.Option(
        "--states",
        help="Take the states from the folder of a capture of this file; the model does not run.",
    ),
]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="Take texts as they are, not as a user's message.")
]


def keep(
    found: Mapping[str, Artefact],
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


def going_on(engine: Engine, request: BaseModel, *more: Any) -> tuple[JournaledEngine, Path]:
    """`engine` over the journal in which an earlier run of `request` has left its work, and that
    file; `more` are as in `journal_of`."""
    from steer.engines.journal import JournaledEngine, journal_of

    journal = journal_of(request, engine, *more)
    journaled = JournaledEngine(engine, journal)
    if journaled.begun:
        err().print("going on where it was ended", highlight=False)
    return journaled, journal
