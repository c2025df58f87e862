"""`steer fit`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    open_registry,
    running_engine,
)
from steer.cli.reporting import out, progress_bar, table_out
from steer.errors import SteerError
from steer.spec import Site, check_name

if TYPE_CHECKING:
    from steer.control_vector import ControlVector


MAX_LAYERS = 1024


class MethodChoice(StrEnum):
    diffmean = "diffmean"
    pca = "pca"


class PositionsChoice(StrEnum):
    last = "last"
    mean = "mean"


class WhereChoice(StrEnum):
    last = "last"
    generation = "generation"
    all = "all"


def fit(
    data: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"positive": messages or text, "negative": …}.'),
    ],
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="The vector's name; by default the file's.")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    method: Annotated[
        MethodChoice,
        typer.Option(help="Difference of means, or uncentred PCA of the differences."),
    ] = MethodChoice.diffmean,
    site: Annotated[
        str, typer.Option(help="Where in each block the states are read.")
    ] = "resid_post",
    layers: Annotated[
        str | None, typer.Option(help="Such as 2-5 or 1,3; by default all layers.")
    ] = None,
    positions: Annotated[
        PositionsChoice,
        typer.Option(help="Read the last prompt token, or the mean over the prompt."),
    ] = PositionsChoice.last,
    where: Annotated[
        WhereChoice,
        typer.Option(
            help="Where the vector acts unless a request says otherwise: on the last prompt "
            "token, on what is generated, or on every token."
        ),
    ] = WhereChoice.last,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="The share of pairs kept for measuring.")
    ] = 0.2,
    best: Annotated[
        int, typer.Option(min=1, help="How many of the best layers become the default.")
    ] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pairs in one batch.")] = 16,
    seed: Annotated[int, typer.Option(help="Draws the held-out pairs.")] = 0,
    description: Annotated[str, typer.Option(help="A sentence for the card.")] = "",
    licence: Annotated[str, typer.Option(help="The licence for the card.")] = "",
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; by default NAME.safetensors."),
    ] = None,
    register: Annotated[
        bool, typer.Option("--register", help="Put it into the registry, not into a file.")
    ] = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Fit a control vector from contrastive prompts."""
    from steer.fit import fit as fit_vector
    from steer.fit import read_pairs

    chosen, chosen_site = _name(name or data.stem), _site(site)
    pairs = read_pairs(data)
    wanted = None if layers is None else parse_layers(layers)
    # Every pair is read once, to fit or to measure; where all of them do both, twice.
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("reading pairs", len(pairs)) as done,
    ):
        vector = fit_vector(
            engine,
            pairs,
            name=chosen,
            method=method.value,
            site=chosen_site,
            layers=wanted,
            positions=positions.value,
            where=where.value,
            held_out=held_out,
            seed=seed,
            best=best,
            batch=batch,
            description=description,
            licence=licence,
            progress=done,
        )
    if register:
        with open_registry(registry) as folder:
            entry, created = folder.add(chosen, vector)
        done_line = f"{'registered' if created else 'already registered'}: {entry.id}"
    else:
        path = output or Path(f"{chosen}.safetensors")
        write_file(path, vector.to_bytes())
        done_line = f"wrote {path}"
    show_fit(vector)
    out().print(done_line, highlight=False)


def show_fit(vector: ControlVector) -> None:
    """The card's measures, one row per layer; the default layers marked."""
    from rich.table import Table

    table = Table(title=f"{vector.card.name}: separation of the classes by layer")
    for heading in ("layer", "d′", "positive", "negative", "gap / norm", "default"):
        table.add_column(heading, justify="right")
    for layer, one in sorted(vector.card.measures.items()):
        positive, negative = one.positive or 0.0, one.negative or 0.0
        table.add_row(
            str(layer),
            "–" if one.separation is None else f"{one.separation:.2f}",
            f"{positive:.2f}",
            f"{negative:.2f}",
            f"{(positive - negative) / one.residual_norm:.2f}" if one.residual_norm else "–",
            "●" if layer in vector.card.used_layers else "",
        )
    table_out().print(table)


def parse_layers(text: str) -> tuple[int, ...]:
    """`1,3` or `2-5` (both ends included) as layers; raises `SteerError`."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            layers = range(int(first), int(last if dash else first) + 1)
            found.extend(layers[:MAX_LAYERS])
    except ValueError:
        found = []
    if not found:
        raise SteerError(
            f"{text!r} is no list of layers: write 3, or 1,3, or 2-5", code="invalid_option"
        )
    return tuple(sorted(set(found)))


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


def _name(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise SteerError(str(error), code="invalid_name") from None


def _site(site: str) -> Site:
    from steer.spec import SITES

    for known in SITES:
        if known == site:
            return known
    raise SteerError(
        f"{site!r} is not a site: use one of {', '.join(SITES)}", code="unsupported_site"
    )
