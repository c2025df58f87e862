"""`steer fit low-rank` and `steer fit transfer`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.fit.saving import (
    BatchOption,
    DescriptionOption,
    LicenceOption,
    NameOption,
    OutputOption,
    RegisterOption,
    keep,
    position,
    site_named,
    stored_name,
)
from steer.cli.fit.where import WhereChoice
from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    open_registry,
    running_engine,
)
from steer.cli.reporting import out, progress_bar
from steer.model import parse_layers

if TYPE_CHECKING:
    from steer.artefacts.library import MemoryLibrary
    from steer.registry.registry import Registry


class MapChoice(StrEnum):
    procrustes = "procrustes"
    anchors = "anchors"


def low_rank(
    data: Annotated[Path, typer.Argument(help='JSON lines: {"prompt": …, "answer": …}.')],
    layers: Annotated[str, typer.Option(help="Such as 2-5 or 1,3.")],
    name: NameOption = None,
    model: ModelOption = DEMO_MODEL,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 4,
    site: Annotated[str, typer.Option(help="Where in each block it acts.")] = "resid_post",
    where: Annotated[
        WhereChoice,
        typer.Option(
            help="On the last prompt token, on that and the answer (onward), on the answer, or on "
            "all tokens."
        ),
    ] = WhereChoice.last,
    steps: Annotated[int, typer.Option(min=1, help="Training batches.")] = 200,
    batch: BatchOption = 8,
    rate: Annotated[float, typer.Option(help="Adam's learning rate, falling to 0.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Draws the start and the batches.")] = 0,
    description: DescriptionOption = "",
    licence: LicenceOption = "",
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Train a low-rank adapter (LoReFT) on prompts and answers."""
    from steer.fit import fit_low_rank, read_exercises

    chosen, chosen_site, wanted = stored_name(name, data), site_named(site), parse_layers(layers)
    exercises = read_exercises(data)
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("training", steps) as done,
    ):
        adapter = fit_low_rank(
            engine,
            exercises,
            name=chosen,
            layers=wanted,
            rank=rank,
            site=chosen_site,
            where=where.value,
            steps=steps,
            batch=batch,
            rate=rate,
            seed=seed,
            description=description,
            licence=licence,
            progress=done,
        )
    line = keep({chosen: adapter}, output, register, registry)
    provenance = adapter.card.provenance
    out().print(
        f"loss of the answers: {provenance['first_loss']} → {provenance['last_loss']} nats per "
        "token",
        highlight=False,
    )
    line()


def transfer(
    vector: Annotated[str, typer.Argument(help="A registered vector, or a file.")],
    prompts: Annotated[
        Path, typer.Option("--prompts", "-p", help="JSON lines: prompts both models read.")
    ],
    source: Annotated[str, typer.Option("--from", help="The model the vector was made for.")],
    model: ModelOption = DEMO_MODEL,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="By default the vector's own.")
    ] = None,
    method: Annotated[
        MapChoice, typer.Option(help="A rotation and scale, or the vector as a sum of anchors.")
    ] = MapChoice.procrustes,
    positions: Annotated[str, typer.Option(help="Which token's state is an anchor.")] = "last",
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="The share of prompts that only measures.")
    ] = 0.2,
    batch: BatchOption = 16,
    seed: Annotated[int, typer.Option(help="Draws the held-out prompts.")] = 0,
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Move a vector from one model to another, with its error on the card."""
    from steer.cli.steering import named_vector
    from steer.fit import transfer as move
    from steer.fit.data.pairs import read_prompts

    read = read_prompts(prompts)
    stored, in_file = named_vector(vector)
    with open_registry(registry, source) as folder:
        given = in_file[stored] if in_file else folder.vector(stored)
    chosen = stored_name(name or given.card.name, None)
    with (
        running_engine(source, device=device, dtype=dtype) as first,
        running_engine(model, device=device, dtype=dtype) as second,
        progress_bar("reading prompts", 2 * len(read)) as done,
    ):
        moved = move(
            first,
            second,
            given,
            read,
            name=chosen,
            method=method.value,
            positions=position(positions),
            held_out=held_out,
            seed=seed,
            batch=batch,
            progress=done,
        )
    line = keep({chosen: moved}, output, register, registry)
    errors = moved.card.provenance["transfer_error"]
    assert isinstance(errors, dict)
    for layer, error in errors.items():
        out().print(f"layer {layer}, on other prompts: {error}", highlight=False)
    line()


def one_sae(folder: Registry, name: str) -> MemoryLibrary:
    """A library of the one SAE `name`, which outlives the registry's session."""
    from steer.artefacts.library import MemoryLibrary

    return MemoryLibrary(saes={name: folder.sae(name)})
