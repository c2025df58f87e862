"""`steer fit`: a command per kind of data; contrastive pairs unless another is named."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from steer.cli.fit import models as fit_models
from steer.cli.fit import relations as fit_relations
from steer.cli.fit import unlabelled as fit_unlabelled
from steer.cli.fit.saving import (
    BatchOption,
    DescriptionOption,
    LicenceOption,
    NameOption,
    OutputOption,
    RegisterOption,
    file_errors,
    given_prompt,
    keep,
    layers_or_all,
    position,
    registered_vectors,
    site_named,
    stored_name,
    write_file,
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
from steer.cli.reporting import progress_bar, table_out

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.artefacts.library import Library

__all__ = ["app", "file_errors", "show_fit", "write_file"]


class PairsFirst(TyperGroup):
    """`steer fit FILE` means `steer fit pairs FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["pairs", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=PairsFirst,
    help="Fit vectors, adapters and dictionaries. Without a command's name: pairs.",
    no_args_is_help=True,
)
app.command("lrc")(fit_relations.lrc)
app.command("low-rank")(fit_models.low_rank)
app.command("transfer")(fit_models.transfer)
app.command("snmf")(fit_unlabelled.snmf)
app.command("nmf")(fit_unlabelled.nmf)


class MethodChoice(StrEnum):
    diffmean = "diffmean"
    pca = "pca"
    logistic = "logistic"


class LabelMethodChoice(StrEnum):
    diffmean = "diffmean"
    logistic = "logistic"


SiteOption = Annotated[str, typer.Option(help="Where in each block the states are read.")]
LayersOption = Annotated[
    str | None, typer.Option(help="Such as 2-5 or 1,3; by default all layers.")
]
PositionsOption = Annotated[
    str,
    typer.Option(
        help="Read the last token, the mean over all, the mean over the response, the subject's "
        "last token, or an index: last, mean, response, subject, -2."
    ),
]
WhereOption = Annotated[
    WhereChoice,
    typer.Option(
        help="Where the vector acts unless a request says otherwise: on the last prompt "
        "token, on that and what is generated (onward), on what is generated, or on every token."
    ),
]
HeldOutOption = Annotated[
    float, typer.Option(min=0.0, max=0.9, help="The share of the data kept for measuring.")
]
BestOption = Annotated[
    int, typer.Option(min=1, help="How many of the best layers become the default.")
]
SeedOption = Annotated[int, typer.Option(help="Draws the held-out share.")]


@app.command("pairs")
def pairs(
    data: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"positive": messages or text, "negative": …}.'),
    ],
    name: NameOption = None,
    model: ModelOption = DEMO_MODEL,
    method: Annotated[
        MethodChoice,
        typer.Option(
            help="Difference of means, uncentred PCA of the differences, or logistic regression."
        ),
    ] = MethodChoice.diffmean,
    refine: Annotated[
        str | None,
        typer.Option(help="Fit among the latents of this registered SAE (not logistic)."),
    ] = None,
    site: SiteOption = "resid_post",
    layers: LayersOption = None,
    positions: PositionsOption = "last",
    where: WhereOption = WhereChoice.last,
    held_out: HeldOutOption = 0.2,
    best: BestOption = 1,
    batch: BatchOption = 16,
    seed: SeedOption = 0,
    beside: Annotated[
        bool, typer.Option(help="Note the cosine to the registry's vectors for this model.")
    ] = False,
    description: DescriptionOption = "",
    licence: LicenceOption = "",
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Fit a control vector from contrastive prompts."""
    from steer.fit import fit as fit_vector
    from steer.fit import read_pairs

    chosen, chosen_site, wanted = stored_name(name, data), site_named(site), layers_or_all(layers)
    read = read_pairs(data)
    others: dict[str, ControlVector] = {}
    library: Library | None = None
    if beside or refine is not None:
        with open_registry(registry, model) as folder:
            others = registered_vectors(folder, model) if beside else {}
            library = None if refine is None else fit_models.one_sae(folder, refine)
    # Every pair is read once, to fit or to measure; where all of them do both, twice.
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("reading pairs", len(read)) as done,
    ):
        vector = fit_vector(
            engine,
            read,
            name=chosen,
            method=method.value,
            refine=None if refine is None else {"sae": refine},
            library=library,
            site=chosen_site,
            layers=wanted,
            positions=position(positions),
            where=where.value,
            held_out=held_out,
            seed=seed,
            best=best,
            batch=batch,
            description=description,
            licence=licence,
            beside=others,
            progress=done,
        )
    line = keep({chosen: vector}, output, register, registry)
    show_fit(vector)
    line()


@app.command("labels")
def labels(
    data: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"text": …, "label": …}, or with messages or prompt.'),
    ],
    name: NameOption = None,
    only: Annotated[
        str | None, typer.Option(help="Comma-separated labels; by default every one.")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    method: Annotated[
        LabelMethodChoice, typer.Option(help="Difference of means, or logistic regression.")
    ] = LabelMethodChoice.diffmean,
    site: SiteOption = "resid_post",
    layers: LayersOption = None,
    positions: PositionsOption = "last",
    where: WhereOption = WhereChoice.last,
    held_out: HeldOutOption = 0.2,
    best: BestOption = 1,
    batch: BatchOption = 32,
    seed: SeedOption = 0,
    description: DescriptionOption = "",
    licence: LicenceOption = "",
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Fit a vector for each label, NAME-LABEL, against all others."""
    from steer.fit import fit_labels, read_labelled

    chosen, chosen_site, wanted = stored_name(name, data), site_named(site), layers_or_all(layers)
    texts = read_labelled(data)
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("reading texts", len(texts)) as done,
    ):
        found = fit_labels(
            engine,
            texts,
            name=chosen,
            labels=None if only is None else only.split(","),
            method=method.value,
            site=chosen_site,
            layers=wanted,
            positions=position(positions),
            where=where.value,
            held_out=held_out,
            seed=seed,
            best=best,
            batch=batch,
            description=description,
            licence=licence,
            progress=done,
        )
    line = keep({one.card.name: one for one in found.values()}, output, register, registry)
    for vector in found.values():
        show_fit(vector)
    line()


@app.command("prompts")
def prompts(
    name: Annotated[str, typer.Argument(help="The vector's name.")],
    toward: Annotated[str, typer.Option(help="The prompt to lead to: a text, or JSON messages.")],
    away: Annotated[str, typer.Option(help="The prompt to lead away from.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="Take texts as they are, not as a user's message.")
    ] = False,
    model: ModelOption = DEMO_MODEL,
    site: SiteOption = "resid_post",
    layers: LayersOption = None,
    positions: PositionsOption = "last",
    where: WhereOption = WhereChoice.last,
    description: DescriptionOption = "",
    licence: LicenceOption = "",
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Fit the vector between two prompts' states."""
    from steer.fit import fit_two_prompts

    chosen, chosen_site, wanted = stored_name(name, None), site_named(site), layers_or_all(layers)
    with running_engine(model, device=device, dtype=dtype) as engine:
        vector = fit_two_prompts(
            engine,
            name=chosen,
            toward=given_prompt(toward, plain),
            away=given_prompt(away, plain),
            site=chosen_site,
            layers=wanted,
            positions=position(positions),
            where=where.value,
            description=description,
            licence=licence,
        )
    line = keep({chosen: vector}, output, register, registry)
    show_fit(vector)
    line()


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
