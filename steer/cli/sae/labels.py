"""`steer sae labels`: what features are called, brought along or made here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.local import DEMO_MODEL, ModelOption, RegistryOption, open_registry
from steer.cli.sae.place import JsonOption, SAEArgument
from steer.cli.sae.tables import say, table

if TYPE_CHECKING:
    from steer.fit.features.labeller import Labeller

labels_app = typer.Typer(
    help="Labels of features, brought along or made here.", no_args_is_help=True
)

LabellerOption = Annotated[
    str | None,
    typer.Option(
        help="A model that is asked, http://HOST/v1#model=NAME, with the key in OPENAI_API_KEY."
    ),
]


def labeller_at(place: str | None) -> Labeller | None:
    """The labeller that an option names. Raises `SteerError`."""
    from steer.fit.features.labeller import Labeller
    from steer.fit.measure.scorers import judge_place

    if place is None:
        return None
    url, model = judge_place(place)
    return Labeller(url, model, api_key=os.environ.get("OPENAI_API_KEY") or "none")


@labels_app.command("import")
def import_labels(
    sae: SAEArgument,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A Neuronpedia export (.jsonl, .jsonl.gz: explanations, features, activations), "
            'or JSON such as {"5": "French words"}.'
        ),
    ],
    source: Annotated[
        str | None, typer.Option(help="What the source is called; by default its layout.")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Bring labels along, and keep them beside the SAE."""
    from steer.formats.labels.reading import read_label_files

    with open_registry(registry, model) as library:
        held = library.sae(sae)
        read = read_label_files(files)
        read.check(held.d_sae, held.layer)
        kept = library.side_labels.keep(
            library.entry("sae", sae).sha256, source or read.layout, "imported", read.labels
        )
    say(f"{len(read.labels)} labels of {sae} from the source {kept.source!r}: {kept.labels} in all")


@labels_app.command("make")
def make_labels(
    sae: SAEArgument,
    features: Annotated[
        list[int] | None,
        typer.Argument(min=0, help="The features' numbers; by default all that fired."),
    ] = None,
    labeller: LabellerOption = None,
    source: Annotated[
        str | None,
        typer.Option(help="What the source is called; by default exemplars, or labeller."),
    ] = None,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Make labels of what a survey saw: of the best examples alone, or by asking a model."""
    from steer.cli.options import checked
    from steer.fit.requests.features.labels import LabelRequest

    fields = {"sae": sae, "features": features or None, "source": source}
    request = checked(LabelRequest, fields)
    asked = labeller_at(labeller)
    with open_registry(registry, model) as library:
        request.check_survey(library)
        kept = request.run(library, asked)
    say(f"{kept.labels} labels of {sae} from the source {kept.source!r}")


@labels_app.command("list")
def list_labels(
    sae: SAEArgument,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """List the sources of an SAE's labels."""
    with open_registry(registry, model) as library:
        own = len(library.sae(sae).labels)
        found = library.side_labels.sources(library.entry("sae", sae).sha256)
    if as_json:
        typer.echo(json.dumps([one.model_dump() for one in found], indent=2))
        return
    table(
        ("source", "kind", "labels"),
        [
            ("(the SAE's own)", "own", str(own)),
            *((one.source, one.kind, str(one.labels)) for one in found),
        ],
    )


@labels_app.command("remove")
def remove_labels(
    sae: SAEArgument,
    source: Annotated[str, typer.Argument(help="The source, as `list` names it.")],
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Remove the labels of one source."""
    with open_registry(registry, model) as library:
        library.side_labels.remove(library.entry("sae", sae).sha256, source)
    say(f"removed the labels of {sae} from the source {source!r}")
