"""`steer sae train`: an SAE of the model's own states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import RegisterOption, StatesOption, file_errors
from steer.cli.local import kept_states, open_registry, running_engine
from steer.cli.measure.asking import AS_JSON
from steer.cli.options import MODEL, PLACE, checked, command, keyword, options, read_values
from steer.cli.reporting import bars_one_by_one, out
from steer.fit.requests.saes.training import SAETrainingRequest

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.saes.training import TrainedSAE

_OUT = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The folder to write, as SAELens reads it; by default NAME."),
]
_PLOT = Annotated[
    Path | None, typer.Option("--plot", help="A picture of the training: PNG, SVG or PDF.")
]
_LABELLED = Annotated[
    bool,
    typer.Option(
        "--labelled",
        help="Each line has a 'label' too, or 'labels' that are true or false: the first latents "
        "are taught one of them each.",
    ),
]


def _parameters() -> Iterator[Parameter]:
    fields = {one.name: one for one in options(SAETrainingRequest, leave_out=("prompts", "labels"))}
    text = SAETrainingRequest.model_fields["prompts"].metadata[0].help
    yield keyword("prompts", Annotated[Path, typer.Argument(help=text)])
    yield from (one for one in fields.values() if one.default is one.empty)
    yield MODEL
    yield keyword("labelled", _LABELLED, False)
    yield from (one for one in fields.values() if one.default is not one.empty)
    yield keyword("states", StatesOption, None)
    yield keyword("output", _OUT, None)
    yield keyword("register", RegisterOption, False)
    yield keyword("plot", _PLOT, None)
    yield AS_JSON
    yield from PLACE


def _request(values: dict[str, Any]) -> SAETrainingRequest:
    """The request, with the texts of the file. Raises `SteerError`."""
    from steer.fit.data.labels import read_judged
    from steer.fit.data.pairs import read_prompts
    from steer.fit.data.prompt import prompt_json

    path, fields = (
        values.pop("prompts"),
        read_values(SAETrainingRequest, {**values, "states": None}),
    )
    if values["labelled"]:
        found = read_judged(path)
        fields["prompts"] = [prompt_json(one.prompt) for one in found]
        names = {name for one in found for name in one.labels}
        fields["labels"] = {name: [one.labels.get(name) for one in found] for name in names}
    else:
        fields["prompts"] = [prompt_json(one) for one in read_prompts(path)]
    return checked(SAETrainingRequest, fields)


def _train(values: dict[str, Any]) -> None:
    from steer.artefacts.sae import save_directory
    from steer.fit.saes.plot import plot_training

    request = _request(values)
    with (
        _engine(values) as engine,
        bars_one_by_one() as counter,
    ):
        request.check(engine)
        found = request.run(engine, counter, device=values["device"])
        if values["register"]:
            with open_registry(values["registry"], values["model"]) as library:
                entry, _ = library.add(request.name, found.sae)
            kept = f"registered: {entry.id}"
        else:
            folder = values["output"] or Path(request.name)
            with file_errors(folder):
                save_directory(found.sae, folder)
            kept = f"wrote {folder}"
        request.forget(engine)
    if values["plot"] is not None:
        plot_training(found, values["plot"], title=f"{request.name}: {request.architecture}")
    if values["as_json"]:
        typer.echo(json.dumps(_as_json(found), indent=2))
        return
    _show(found)
    out().print(kept, highlight=False)


@contextmanager
def _engine(values: dict[str, Any]) -> Iterator[Engine]:
    """The model, or the states that were kept of it."""
    if values["states"] is not None:
        yield kept_states(values["states"], values["model"])
        return
    with running_engine(values["model"], device=values["device"], dtype=values["dtype"]) as engine:
        yield engine


def _as_json(found: TrainedSAE) -> dict[str, Any]:
    made = found.sae.card.provenance
    return {"held_out": found.measures.model_dump(), "loss": made.get("loss"), "made": dict(made)}


def _show(found: TrainedSAE) -> None:
    """What it is worth, in lines."""
    one, sae = found.measures, found.sae
    lines = [
        f"{sae.card.name}: {sae.d_sae} features of {sae.d_in} channels, layer {sae.layer}, "
        f"{sae.site}, {sae.architecture}",
        f"on {one.tokens} tokens held out: {one.explained:.1%} of the variance explained, "
        f"{one.active:.1f} features on a token, {one.dead:.1%} on none, {one.dense:.1%} on more "
        "than a tenth",
    ]
    loss = sae.card.provenance.get("loss")
    if isinstance(loss, dict):
        lines.append(
            f"loss of the model: {loss['own']:.3f} nats a token, {loss['rebuilt']:.3f} on what it "
            f"rebuilds, {loss['mean']:.3f} on the mean state: {loss['recovered']:.1%} recovered"
        )
    for line in lines:
        out().print(line, highlight=False, markup=False)


train = command(
    _train,
    tuple(_parameters()),
    summary="""Train an SAE on the model's own states of texts.

    The states are kept in the cache while the work goes on, and so is a checkpoint: the same
    command, given again, goes on where the first was ended.
    """,
)
