"""`steer fit lrc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer.cli.fit.saving import (
    DescriptionOption,
    LicenceOption,
    NameOption,
    OutputOption,
    RegisterOption,
    keep,
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
from steer.cli.reporting import out, progress_bar


def lrc(
    data: Annotated[
        Path, typer.Argument(help='JSON lines: {"subject": …, "relation": …, "object": …}.')
    ],
    relation: Annotated[str, typer.Option(help="The relation to fit, as the file names it.")],
    prompt: Annotated[
        str, typer.Option(help="The question, such as 'What is the capital of {subject}?'.")
    ],
    opening: Annotated[str, typer.Option(help="How the answer begins, up to the object.")] = "",
    plain: Annotated[
        bool, typer.Option("--plain", help="Take the question as a text, not as a chat.")
    ] = False,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before the question.")] = 0,
    name: NameOption = None,
    model: ModelOption = DEMO_MODEL,
    subject_layer: Annotated[
        int | None, typer.Option(help="By default just before half the depth.")
    ] = None,
    object_layer: Annotated[int | None, typer.Option(help="By default the last but one.")] = None,
    site: Annotated[
        str, typer.Option(help="Where in its block the subject's state is read.")
    ] = "resid_post",
    rank: Annotated[int, typer.Option(min=1, help="Of the inverse.")] = 8,
    jacobians: Annotated[int, typer.Option(min=1, help="Facts that make the map.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws the solved examples.")] = 0,
    description: DescriptionOption = "",
    licence: LicenceOption = "",
    output: OutputOption = None,
    register: RegisterOption = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Fit a concept, NAME-OBJECT, for each object of a relation."""
    from steer.fit import Template, fit_lrc, read_relations

    chosen, chosen_site = stored_name(name, data), site_named(site)
    table = read_relations(data)
    facts = len(table.about(relation))
    with (
        running_engine(model, device=device, dtype=dtype) as engine,
        progress_bar("facts and Jacobians", facts + min(jacobians, facts)) as done,
    ):
        found = fit_lrc(
            engine,
            table,
            name=chosen,
            relation=relation,
            template=Template(prompt, opening, chat=not plain, shots=shots),
            subject_layer=subject_layer,
            object_layer=object_layer,
            site=chosen_site,
            rank=rank,
            jacobians=jacobians,
            seed=seed,
            description=description,
            licence=licence,
            progress=done,
        )
    line = keep({one.card.name: one for one in found.values()}, output, register, registry)
    provenance = next(iter(found.values())).card.provenance
    out().print(
        f"{len(found)} concepts from {provenance['answered']} of {provenance['facts']} facts that "
        "the model knows",
        highlight=False,
    )
    line()
