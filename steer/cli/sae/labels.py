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
    from steer.fit.features.asked.embedder import Embedder
    from steer.fit.features.labeller import Labeller

labels_app = typer.Typer(
    help="Labels of features, brought along or made here.", no_args_is_help=True
)

MOST_ASKED = 4096
"""Questions that one command asks a labeller."""

LabellerOption = Annotated[
    str | None,
    typer.Option(
        help="A model that is asked, http://HOST/v1#model=NAME, with the key in OPENAI_API_KEY."
    ),
]


def labeller_at(place: str | None) -> Labeller | None:
    """The labeller that an option names. Raises `SteerError`."""
    from steer.fit.features.asked.answers import AskedWork
    from steer.fit.features.asked.outside import OutsideModel
    from steer.fit.features.labeller import Labeller

    if place is None:
        return None
    outside = OutsideModel.at(place, os.environ.get("OPENAI_API_KEY"))
    return Labeller(outside, most=MOST_ASKED, work=AskedWork())


def say_cost(labeller: Labeller | None) -> None:
    """What a labeller was asked, where there is one."""
    if labeller is not None and labeller.work is not None:
        used = labeller.work.usage
        say(
            f"the labeller was asked {used.calls} times: {used.prompt_tokens} tokens read, "
            f"{used.completion_tokens} written"
        )


EmbedderOption = Annotated[
    str | None,
    typer.Option(
        help="A model that embeds texts, http://HOST/v1#model=NAME, with the key in "
        "OPENAI_API_KEY: search by meaning."
    ),
]


def embedder_at(place: str | None) -> Embedder | None:
    """The embedder that an option names. Raises `SteerError`."""
    from steer.fit.features.asked.embedder import Embedder
    from steer.fit.features.asked.outside import OutsideModel

    if place is None:
        return None
    return Embedder(OutsideModel.at(place, os.environ.get("OPENAI_API_KEY")))


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
    say_cost(asked)


@labels_app.command("embed")
def embed_labels(
    sae: SAEArgument,
    embedder: Annotated[
        str,
        typer.Option(
            help="A model that embeds texts, http://HOST/v1#model=NAME, with the key in "
            "OPENAI_API_KEY."
        ),
    ],
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Embed the labels that are not yet, so that they are found by their meaning."""
    from steer.cli.options import checked
    from steer.cli.reporting import progress_bar
    from steer.fit.requests.features.embed import EmbedRequest

    request = checked(EmbedRequest, {"sae": sae})
    asked = embedder_at(embedder)
    assert asked is not None
    with open_registry(registry, model) as library:
        request.check_labels(library)
        with progress_bar("labels", len(library.labels(sae))) as done:
            found = request.run(library, asked, progress=done)
    say(
        f"{found.embedded} texts embedded by {found.embedder!r} in {found.calls} calls, "
        f"{found.width} numbers each; {found.labels} features of {sae} have a label"
    )


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
