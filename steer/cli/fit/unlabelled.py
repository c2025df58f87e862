"""`steer fit snmf` and `steer fit nmf`: dictionaries, which need no labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.fit.saving import (
    BatchOption,
    NameOption,
    OutputOption,
    RegisterOption,
    keep,
    position,
    site_named,
    stored_name,
)
from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    running_engine,
)
from steer.cli.reporting import progress_bar, table_out

if TYPE_CHECKING:
    from steer.fit.methods.dictionary import Dictionary

DataArgument = Annotated[
    Path, typer.Argument(help="JSON lines: texts, messages, or objects with messages or prompt.")
]
LayerOption = Annotated[int, typer.Option(min=0, help="The layer to read.")]
IterationsOption = Annotated[int, typer.Option(min=1, help="Steps of the factorisation.")]
SampleOption = Annotated[
    int, typer.Option(min=1, help="At most so many activations are factored; a uniform sample.")
]
SeedOption = Annotated[int, typer.Option(help="Draws the sample and the start.")]


def snmf(
    data: DataArgument,
    layer: LayerOption,
    name: NameOption = None,
    model: ModelOption = DEMO_MODEL,
    components: Annotated[int, typer.Option(min=1, help="How many to look for.")] = 50,
    share: Annotated[
        float, typer.Option("--keep", min=0.0, max=1.0, help="The share of neurons each keeps.")
    ] = 0.01,
    iterations: IterationsOption = 100,
    positions: Annotated[
        str, typer.Option(help="mean is every token; response, the response's; or one token.")
    ] = "mean",
    sample: SampleOption = 20_000,
    batch: BatchOption = 16,
    seed: SeedOption = 0,
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Find groups of MLP neurons (sparse semi-NMF), and keep each as a vector, NAME-N."""
    from steer.fit import fit_snmf
    from steer.fit.data.pairs import read_prompts

    chosen, read = stored_name(name, data), read_prompts(data)
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("prompts and iterations", len(read) + iterations) as done,
    ):
        found = fit_snmf(
            engine,
            read,
            layer=layer,
            components=components,
            keep=share,
            iterations=iterations,
            positions=position(positions),
            sample=sample,
            seed=seed,
            batch=batch,
            progress=done,
        )
    _finish(found, chosen, output, register, registry)


def nmf(
    data: DataArgument,
    layer: LayerOption,
    name: NameOption = None,
    model: ModelOption = DEMO_MODEL,
    components: Annotated[int, typer.Option(min=1, help="How many to look for.")] = 10,
    penalty: Annotated[float, typer.Option(min=0.0, help="The price of weights.")] = 0.01,
    iterations: IterationsOption = 200,
    site: Annotated[str, typer.Option(help="Where in the block the states are read.")] = (
        "resid_post"
    ),
    positions: Annotated[str, typer.Option(help="Which token's state is read.")] = "last",
    sample: SampleOption = 20_000,
    batch: BatchOption = 16,
    seed: SeedOption = 0,
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Find a dictionary of token states (CoX-LMM), and keep each concept as a vector, NAME-N."""
    from steer.fit import fit_nmf
    from steer.fit.data.pairs import read_prompts

    chosen, read, chosen_site = stored_name(name, data), read_prompts(data), site_named(site)
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("prompts and iterations", len(read) + iterations) as done,
    ):
        found = fit_nmf(
            engine,
            read,
            layer=layer,
            components=components,
            penalty=penalty,
            iterations=iterations,
            site=chosen_site,
            positions=position(positions),
            sample=sample,
            seed=seed,
            batch=batch,
            progress=done,
        )
    _finish(found, chosen, output, register, registry)


def _finish(
    found: Dictionary, name: str, output: Path | None, register: bool, registry: str | None
) -> None:
    """Keeps every component, and shows what has most of it."""
    from rich.markup import escape
    from rich.table import Table

    vectors = {f"{name}-{n}": found.vector(n, name=f"{name}-{n}") for n in range(len(found))}
    line = keep(vectors, output, register, registry)
    table = Table(title=f"{name}: {found.explained:.1%} of the squared length explained")
    for heading in ("component", "weight", "has most of it"):
        table.add_column(heading)
    for n, examples in enumerate(found.examples):
        shown = " · ".join(escape(one.text[-60:]) for one in examples[:3])
        table.add_row(str(n), f"{float(found.scales[n]):.2f}", shown)
    table_out().print(table)
    line()
