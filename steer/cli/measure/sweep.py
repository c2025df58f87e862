"""`steer sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import write_file
from steer.cli.local import open_registry, plans, running_engine
from steer.cli.measure.asking import asked, parameters
from steer.cli.measure.scoring import scorer_of
from steer.cli.options import checked, command, keyword, read_values
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import named_vector
from steer.fit.requests.measuring import SweepRequest

if TYPE_CHECKING:
    from steer.fit.measure.sweep import DoseResponse

_OWN = (
    keyword(
        "plot",
        Annotated[
            Path | None, typer.Option(help="Where the picture goes; by default NAME-sweep.png.")
        ],
        None,
    ),
    keyword(
        "json_out",
        Annotated[
            Path | None,
            typer.Option("--json", help="Write the figures here as JSON; - is stdout."),
        ],
        None,
    ),
)


def _sweep(values: dict[str, Any]) -> None:
    from steer.fit.measure.plot import plot_dose_response

    fields = read_values(SweepRequest, values)
    score, json_out = values["score"], values["json_out"]
    fields["vector"], overlay = named_vector(values["vector"])
    with open_registry(values["registry"], values["model"]) as library:
        scorer = scorer_of(score, library)
        request = checked(SweepRequest, {**fields, "prompts": asked(values)})
        with (
            running_engine(
                values["model"], device=values["device"], dtype=values["dtype"], bulk=True
            ) as engine,
            progress_bar("answers", request.answers) as done,
        ):
            cache = plans(engine, library)
            response = request.run(engine, cache, scorer, vectors=overlay, progress=done)
    title = f"{request.vector}: {score} over {len(request.prompts)} prompts"
    to_stdout = json_out is not None and str(json_out) == "-"
    if not to_stdout:
        show_doses(response, title)
    found = {"vector": request.vector, "score": score, **response.as_json()}
    text = json.dumps(found, indent=2)
    picture = values["plot"] or Path(f"{request.vector.split('@')[0]}-sweep.png")
    plot_dose_response(response, picture, title=title)
    if to_stdout:
        typer.echo(text)
        return
    out().print(f"wrote {picture}", highlight=False)
    if json_out is not None:
        write_file(json_out, text.encode() + b"\n")
        out().print(f"wrote {json_out}", highlight=False)


sweep = command(
    _sweep,
    tuple(parameters(SweepRequest, *_OWN)),
    summary="Measure what a vector does over a range of strengths: table, picture, JSON.",
)


def show_doses(response: DoseResponse, title: str) -> None:
    """One row per strength, the unsteered model first, with an answer of each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for heading in ("strength", "score", "valid", "both", "loss", "perplexity ratio"):
        table.add_column(heading, justify="right")
    table.add_column("an answer", overflow="fold")
    rows = [("unsteered", response.unsteered, 1.0)]
    rows += [
        (f"{dose.strength:g}", dose.measured, dose.perplexity_ratio) for dose in response.doses
    ]
    for label, one, ratio in rows:
        table.add_row(
            label,
            f"{one.score:.2f}",
            "–" if one.valid is None else f"{one.valid:.2f}",
            "–" if one.both is None else f"{one.both:.2f}",
            f"{one.loss:.3f}",
            f"{ratio:.2f}",
            Text(one.examples[0] if one.examples else ""),
        )
    table_out().print(table)
