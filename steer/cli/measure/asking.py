"""What `steer sweep`, `calibrate` and `evaluate` share: options of their requests, and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.options import MODEL, PLACE, keyword, options
from steer.fit.requests.fields import Spelled
from steer.fit.requests.measuring import MeasureRequest

LIMIT = keyword(
    "limit", Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")], 200
)
REPORT = keyword(
    "report",
    Annotated[Path | None, typer.Option(help="A folder for report.json, a picture and a page.")],
    None,
)
AS_JSON = keyword("as_json", Annotated[bool, typer.Option("--json", help="Print JSON.")], False)


def parameters(
    request: type[MeasureRequest],
    *own: Parameter,
    first: Iterable[Parameter] = (),
    optional: Iterable[str] = (),
) -> Iterator[Parameter]:
    """The options of `request`: `first`, those that are required, the rest, and the command's
    `own`. The fields `optional` need not be given here."""
    fields = {one.name: one for one in options(request, leave_out=("prompts",))}
    fields |= {n: fields[n].replace(default=None) for n in optional if n in fields}
    spelled = next(
        one for one in request.model_fields["prompts"].metadata if isinstance(one, Spelled)
    )
    yield from first
    if "vector" in fields:
        yield fields.pop("vector")
    named = typer.Option(*spelled.flags, help=spelled.help)
    if "prompts" in optional:
        yield keyword("prompts", Annotated[Path | None, named], None)
    else:
        yield keyword("prompts", Annotated[Path, named])
    yield from (one for one in fields.values() if one.default is one.empty)
    yield MODEL
    yield from (one for one in fields.values() if one.default is not one.empty)
    yield LIMIT
    yield from own
    yield from PLACE


def asked(values: Mapping[str, Any]) -> list[Any]:
    """The prompts of the file that was named, as a request takes them. Raises `SteerError`."""
    from steer.fit.data.pairs import read_prompts
    from steer.fit.data.prompt import prompt_json

    return [prompt_json(one) for one in read_prompts(values["prompts"])[: values["limit"]]]
