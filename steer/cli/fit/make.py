"""`steer make`: from a sentence to a vector that works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import OutputOption, RegisterOption, going_on, keep
from steer.cli.local import open_registry, running_engine
from steer.cli.measure.asking import AS_JSON, REPORT
from steer.cli.measure.scoring import scorer_of
from steer.cli.options import MODEL, PLACE, checked, command, keyword, options, read_values
from steer.cli.reporting import err, out, progress_bar, table_out
from steer.fit.requests.make import MakeRequest

if TYPE_CHECKING:
    from steer.engines.transformers.engine import TransformersEngine
    from steer.fit.make.made import Made

_PROMPTS = keyword(
    "prompts",
    Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            "-p",
            help="JSON lines with what is asked, at least 24; by default the shipped questions.",
        ),
    ],
    None,
)


def _parameters() -> Iterator[Parameter]:
    fields = {one.name: one for one in options(MakeRequest, leave_out=("prompts",))}
    yield fields.pop("instruction")
    yield fields.pop("name")
    yield MODEL
    yield _PROMPTS
    yield from fields.values()
    yield keyword("output", OutputOption, None)
    yield keyword("register", RegisterOption, False)
    yield REPORT
    yield AS_JSON
    yield from PLACE


def _hint(engine: TransformersEngine, dtype: str | None) -> None:
    from steer.engines.transformers.checkpoints.placing import multiplies_bfloat16

    if dtype is None and engine.info.dtype == "float32" and multiplies_bfloat16():
        err().print(
            "computing in float32; on this processor --dtype bfloat16 takes about a third of the "
            "time",
            highlight=False,
        )


def _make(values: dict[str, Any]) -> None:
    from steer.engines.journal import forget
    from steer.fit.data.pairs import read_prompts
    from steer.fit.data.prompt import prompt_json
    from steer.fit.make.report import write_made_report

    fields = read_values(MakeRequest, values)
    if values["prompts"] is not None:
        fields["prompts"] = [prompt_json(one) for one in read_prompts(values["prompts"])]
    request = checked(MakeRequest, fields)
    with ExitStack() as stack:
        scorer = None
        if request.score is not None:
            library = stack.enter_context(open_registry(values["registry"], values["model"]))
            scorer = scorer_of(request.score, library)
        engine = stack.enter_context(
            running_engine(
                values["model"], device=values["device"], dtype=values["dtype"], bulk=True
            )
        )
        request.check(engine)
        _hint(engine, values["dtype"])
        journaled, journal = going_on(engine, request)
        done = stack.enter_context(progress_bar("making a vector", request.work(engine)))
        found = request.run(journaled, scorer, progress=done)
    forget(journal)
    if values["report"] is not None:
        write_made_report(values["report"], found)
    kept = keep(
        {request.name: found.vector}, values["output"], values["register"], values["registry"]
    )
    if values["as_json"]:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    show_made(found)
    if values["report"] is not None:
        out().print(f"wrote {values['report']}", highlight=False)
    kept()


make = command(
    _make,
    tuple(_parameters()),
    summary="""Make a vector that does what a sentence asks for, and say how well it does.

    Its layers, tokens and strength are chosen by what the answers do, and it is checked on other
    questions beside asking in words and beside chance.
    """,
)


def show_made(found: Made) -> None:
    """The check's rows and those of chance, an answer under each, and what was chosen."""
    from rich.table import Table
    from rich.text import Text

    from steer.fit.make.report import lines, rows

    table = Table(title=f"{found.wish.name}: {found.check.questions} questions of its own, 95 %")
    table.add_column("", no_wrap=True)
    for heading in ("score", "valid", "wrong way", "cosine"):
        table.add_column(heading, justify="right")
    for row in rows(found):
        table.add_row(Text(row.name), row.score, row.valid, row.wrong_way, row.cosine)
    table_out().print(table)
    for line in lines(found):
        out().print(line, highlight=False, markup=False)
