"""`steer fit`: a command for each way to fit, made from its request; pairs unless named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from steer.cli.fit.saving import (
    BatchOption,
    OutputOption,
    PlainOption,
    PlotOption,
    RegisterOption,
    StatesOption,
    going_on,
    keep,
    stored_name,
)
from steer.cli.local import kept_states, open_registry, running_engine
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
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import named_vector
from steer.fit.requests.request import FitPlace, FitRequest
from steer.fit.requests.table import FIT_REQUESTS

if TYPE_CHECKING:
    from inspect import Parameter

    from steer.artefacts.control_vector import ControlVector
    from steer.engines.base import Engine
    from steer.fit.requests.request import Fitted


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


def _parameters(request: type[FitRequest]) -> Iterator[Parameter]:
    """The data, the fields, and what the command line alone can say."""
    form = request.form
    data = () if form is None else (form.field, "data")
    fields = {one.name: one for one in options(request, leave_out=data)}
    last = [fields.pop(name) for name in ("description", "licence") if name in fields]
    if form is not None:
        where = typer.Option(*form.flags, help=form.line) if form.flags else None
        yield keyword("data", Annotated[Path, where or typer.Argument(help=form.line)])
        # The file's name will do, or that of the vector which is moved.
        fields["name"] = fields["name"].replace(default=None)
    yield from (one for one in fields.values() if one.default is one.empty)
    if _typed_prompts(request):
        yield keyword("plain", PlainOption, False)
    if fields["name"].default is None:
        yield fields.pop("name")
    yield MODEL
    yield from (one for one in fields.values() if one.default is not one.empty)
    if request.batch_size is not None:
        yield keyword("batch", BatchOption, request.batch_size)
    if "states" in request.model_fields:
        yield keyword("states", StatesOption, None)
    yield from last
    if request.drawn:
        yield keyword("plot", PlotOption, None)
    yield keyword("output", OutputOption, None)
    yield keyword("register", RegisterOption, False)
    yield from PLACE


def _typed_prompts(request: type[FitRequest]) -> list[str]:
    """The fields that are prompts typed in, and not read from a file."""
    fields = request.model_fields.items()
    return [name for name, field in fields if spelling(field).reads == "prompt"]


def _fit(kind: type[FitRequest], values: dict[str, Any]) -> None:
    """Runs one command."""
    model, path = values["model"], values.pop("data", None)
    request, files = _request(kind, values, path)
    data = None if kind.form is None else kind.form.read(path)
    engine_options = {name: values[name] for name in ("device", "dtype")}
    with ExitStack() as stack:
        library = None
        if request.needs_registry:
            place = open_registry(values["registry"], request.source_model or model)
            library = stack.enter_context(place)
        source = None
        if request.source_model is not None:
            source = stack.enter_context(running_engine(request.source_model, **engine_options))
        engine: Engine
        if values.get("states") is None:
            engine = stack.enter_context(running_engine(model, **engine_options))
        else:
            engine = kept = kept_states(values["states"], model)
            if getattr(request, "layers", 0) is None:
                request = request.model_copy(update={"layers": kept.layers})
        journal = None
        if kind.resumes and values.get("states") is None:
            engine, journal = _journaled(engine, request, data)
        done = stack.enter_context(progress_bar(request.doing, request.work(data)))
        batch = None if kind.batch_size is None else values["batch"]
        found = request.run(FitPlace(engine, library, files, source, done, batch), data)
    line = keep(found.artefacts, values["output"], values["register"], values["registry"])
    _show(found)
    if found.draw is not None and values.get("plot") is not None:
        found.draw(values["plot"])
        out().print(f"wrote {values['plot']}", highlight=False)
    if journal is not None:
        from steer.engines.journal import forget

        forget(journal)
    line()


def _journaled(engine: Engine, request: FitRequest, data: Any) -> tuple[Engine, Path]:
    """`going_on` with a command's data."""
    from steer.fit.data.jsonl import sha256_of
    from steer.fit.data.prompt import prompt_json

    sha256 = getattr(data, "sha256", None) or sha256_of([prompt_json(one) for one in data])
    return going_on(engine, request, sha256)


def _request(
    kind: type[FitRequest], values: dict[str, Any], path: Path | None
) -> tuple[FitRequest, dict[str, ControlVector]]:
    """What the options ask for, and the vectors that come from files. Raises `SteerError`."""
    fields = read_values(kind, {**values, "states": None})  # a folder here, and no job
    if values["name"] is not None or kind.model_fields["name"].is_required():
        fields["name"] = stored_name(values["name"], path)
    for name in _typed_prompts(kind):
        if not values["plain"] and isinstance(fields[name], str):
            fields[name] = [{"role": "user", "content": fields[name]}]
    files: dict[str, ControlVector] = {}
    if "vector" in fields:
        fields["vector"], files = named_vector(fields["vector"])
    return checked(kind, fields), files


for _one in FIT_REQUESTS:
    app.command(_one.command)(
        command(partial(_fit, _one), tuple(_parameters(_one)), summary=_one.summary)
    )


def _show(found: Fitted) -> None:
    """The measures of each vector that has some, and what the method has to say."""
    from rich.markup import escape
    from rich.table import Table

    for artefact in found.artefacts.values():
        if getattr(artefact.card, "measures", None):
            show_fit(artefact)  # type: ignore[arg-type]
    if found.rows:
        table = Table(*found.headings, title=found.title)
        for row in found.rows:
            table.add_row(*map(escape, row))
        table_out().print(table)
    for note in found.notes:
        out().print(note, highlight=False)


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
