"""`steer capture`: the states of a whole data set, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.local import open_registry, plans, running_engine
from steer.cli.options import MODEL, PLACE, checked, command, keyword, options, read_values
from steer.cli.reporting import bars_one_by_one, out
from steer.cli.steering import read_spec
from steer.fit.requests.inline import GIVEN
from steer.fit.requests.states import StatesRequest

_SPEC = Annotated[
    Path | None,
    typer.Option("--spec", help="Read and answer under this steering: a JSON file."),
]
_FOLDER = Annotated[Path, typer.Argument(help="The folder to write, or to go on with.")]


def _parameters() -> Iterator[Parameter]:
    yield keyword("texts", Annotated[Path, typer.Argument(help=GIVEN.line)])
    yield keyword("folder", _FOLDER)
    yield MODEL
    yield from options(StatesRequest, leave_out=StatesRequest.data_fields)
    yield keyword("spec", _SPEC, None)
    yield from PLACE


def _capture(values: dict[str, Any]) -> None:
    path, folder = values["texts"], values["folder"]
    fields = read_values(StatesRequest, values)
    if values["spec"] is not None:
        fields["steering"] = read_spec(values["spec"])
    request = checked(StatesRequest, fields)
    given = GIVEN.read(path)
    with ExitStack() as stack:
        plan_of = None
        place = {name: values[name] for name in ("device", "dtype")}
        engine = stack.enter_context(running_engine(values["model"], **place))
        if request.steering is not None:
            library = stack.enter_context(open_registry(values["registry"], values["model"]))
            plan_of = plans(engine, library).plan
        request.check(engine, plan_of)
        counter = stack.enter_context(bars_one_by_one())
        card = request.run(engine, folder, given=given, plan_of=plan_of, counter=counter)
    out().print(
        f"wrote {folder}: {card.rows} rows of {card.texts} texts in {len(card.shards)} files",
        highlight=False,
    )


capture = command(_capture, tuple(_parameters()), summary=StatesRequest.summary)
