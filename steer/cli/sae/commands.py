"""`steer sae`: find features, see what they do, and how far they can be trusted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    open_registry,
)
from steer.cli.measure.asking import AS_JSON
from steer.cli.options import (
    MODEL,
    PLACE,
    checked,
    command,
    keyword,
    options,
    read_values,
    spelling,
)
from steer.cli.reporting import progress_bar
from steer.cli.sae.detector import detector
from steer.cli.sae.effect import EFFECT
from steer.cli.sae.labels import EmbedderOption, embedder_at, labels_app
from steer.cli.sae.place import JsonOption, SAEArgument, working
from steer.cli.sae.score import SCORE
from steer.cli.sae.showing import (
    show_active,
    show_card,
    show_contrast,
    show_family,
    show_matches,
    show_survey,
)
from steer.cli.sae.suggest import SUGGEST
from steer.cli.sae.tables import say
from steer.cli.sae.training import train
from steer.cli.sae.trust import TRUST
from steer.fit.requests.features.texts import ContrastRequest, FeaturesRequest, SurveyRequest

app = typer.Typer(
    help="Find the features of SAEs, and see what they do.",
    no_args_is_help=True,
)


@app.command("show")
def show(
    sae: SAEArgument,
    feature: Annotated[int, typer.Argument(min=0, help="The feature's number.")],
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Show a feature: its label, its neighbours, and what it did where the SAE was surveyed."""
    from steer.registry.features.card import feature_card

    with open_registry(registry, model) as library:
        card = feature_card(library, sae, feature)
    if as_json:
        typer.echo(card.model_dump_json(indent=2, exclude_none=True))
        return
    show_card(card)


@app.command("family")
def family(
    sae: SAEArgument,
    feature: Annotated[int, typer.Argument(min=0, help="The feature's number.")],
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Show the features that fire where one does, and the spec that clamps all of them."""
    from steer.registry.features.families import family_card

    with open_registry(registry, model) as library:
        found = family_card(library, sae, feature)
    if as_json:
        typer.echo(found.model_dump_json(indent=2, exclude_none=True))
        return
    show_family(found)


app.command("detector")(detector)


@app.command("search")
def search(
    sae: SAEArgument,
    query: Annotated[str, typer.Argument(help="Words of a label, or what it is to mean.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    embedder: EmbedderOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Find features by their labels: by words, or with an embedder by meaning."""
    from steer.artefacts.sae.labels import search_labels
    from steer.fit.requests.features.embed import search_by_meaning

    asked = embedder_at(embedder)
    with open_registry(registry, model) as library:
        unread = 0
        if asked is None:
            found = search_labels(library.labels(sae), query, limit=limit)
        else:
            near = search_by_meaning(library, sae, query, asked, limit=limit)
            found, unread = near.matches, near.labels - near.known
    if as_json:
        typer.echo(json.dumps([one.model_dump(exclude_none=True) for one in found], indent=2))
        return
    show_matches(found, by_meaning=asked is not None)
    if unread:
        say(f"{unread} labels are not embedded: `steer sae labels embed {sae}`")


@app.command("tokens")
def tokens(
    sae: SAEArgument,
    prompt: Annotated[str, typer.Argument(help="A sentence.")],
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="A piece of the sentence: then its last token. May be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=256, help="Features of each token.")] = 3,
    chat: Annotated[
        bool, typer.Option("--chat", help="As a user's message, in the model's chat template.")
    ] = False,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Show which features fire on each token of a sentence."""
    from steer.inspection import ACTIVATIONS
    from steer.inspection.activations import ActivationsResult
    from steer.prompts import as_chat

    fields: dict[str, Any] = {"sae": sae, "top_features": top, "positions": at or "all"}
    with working(model=model, registry=registry, device=device, dtype=dtype) as (engine, library):
        asked = as_chat(engine.tokenizer, prompt) if chat else prompt
        fields["text" if isinstance(asked, str) else "messages"] = asked
        layer = library.sae(sae).layer
        request = checked(ACTIVATIONS.request, {**fields, "layers": [layer]})
        result = ACTIVATIONS.run(engine, request, library=library)
    if as_json:
        typer.echo(result.model_dump_json(indent=2, exclude_none=True))
        return
    assert isinstance(result, ActivationsResult)
    show_active(result)


def _parameters(request: type[FeaturesRequest]) -> Iterator[Parameter]:
    """The options of `request`; the texts come from files."""
    fields = list(options(request, leave_out=request.data))
    yield fields.pop(0)
    for name in request.data:
        argument = typer.Argument(help=spelling(request.model_fields[name]).help)
        if name == "negative":  # else both are in one file
            yield keyword(name, Annotated[Path | None, argument], None)
        else:
            yield keyword(name, Annotated[Path, argument])
    yield MODEL
    yield from fields
    yield AS_JSON
    yield from PLACE


def _request(kind: type[FeaturesRequest], values: dict[str, Any]) -> Any:
    """The request, its texts read from the files that were named. Raises `SteerError`."""
    from steer.fit.data.pairs import read_pairs, read_prompts
    from steer.fit.data.prompt import prompt_json

    files = {name: values.pop(name) for name in kind.data}
    if files.get("negative", files) is None:
        pairs = read_pairs(files["positive"]).items
        texts = {
            "positive": [prompt_json(one.positive) for one in pairs],
            "negative": [prompt_json(one.negative) for one in pairs],
        }
    else:
        texts = {name: [prompt_json(one) for one in read_prompts(f)] for name, f in files.items()}
    return checked(kind, {**read_values(kind, values), **texts})


def _survey(values: dict[str, Any]) -> None:
    request: SurveyRequest = _request(SurveyRequest, values)
    with (
        working(**values) as (engine, library),
        tempfile.TemporaryDirectory(prefix="steer-survey-") as scratch,
    ):
        request.check(engine, library)
        with progress_bar("texts", request.texts) as done:
            found = request.run(engine, library, Path(scratch), progress=done).counts()
    if values["as_json"]:
        typer.echo(json.dumps(found, indent=2))
        return
    show_survey(request.sae, found)


def _contrast(values: dict[str, Any]) -> None:
    request: ContrastRequest = _request(ContrastRequest, values)
    with working(**values) as (engine, library):
        request.check(engine, library)
        with progress_bar("texts", request.texts) as done:
            found = request.run(engine, library, progress=done)
    if values["as_json"]:
        typer.echo(found.model_dump_json(indent=2, exclude_none=True))
        return
    show_contrast(found)


app.command("survey")(
    command(
        _survey,
        tuple(_parameters(SurveyRequest)),
        summary="Count what every feature does on texts, and keep its best examples.",
    )
)
app.command("contrast")(
    command(
        _contrast,
        tuple(_parameters(ContrastRequest)),
        summary="Find the features that tell two sets of texts apart, and not by chance.",
    )
)
app.command("train")(train)
app.command("effect")(EFFECT)
app.command("score")(SCORE)
app.command("trust")(TRUST)
app.command("suggest")(SUGGEST)
app.add_typer(labels_app, name="labels")
