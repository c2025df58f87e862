"""`steer sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.fit.contrast import write_file
from steer.cli.fit.where import WhereChoice
from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    open_registry,
    plans,
    running_engine,
)
from steer.cli.measure.scoring import SCORER_HELP, scorer_of
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import LayersOption, add_spec, named_vector
from steer.errors import SteerError
from steer.model import parse_layers

if TYPE_CHECKING:
    from steer.fit.data.pairs import Prompt
    from steer.fit.measure.sweep import DoseResponse
    from steer.plan.plan import SteeringPlan


def sweep(
    vector: Annotated[
        str, typer.Argument(help="A registered vector (name or name@hash), or a file.")
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            "-p",
            help="JSON lines: texts, messages, or objects with messages or prompt.",
        ),
    ],
    score: Annotated[str, typer.Option("--score", "-s", help=SCORER_HELP)],
    strengths: Annotated[
        str, typer.Option(help="Comma-separated, in multiples of the stored vector.")
    ] = "0.25,0.5,0.75,1,1.5,2",
    model: ModelOption = DEMO_MODEL,
    layers: LayersOption = None,
    where: Annotated[
        WhereChoice | None, typer.Option(help="Which tokens are steered; by default the card's.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="The length of an answer.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Where the picture goes; by default NAME-sweep.png.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here as JSON; - is stdout.")
    ] = None,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure what a vector does over a range of strengths: table, picture, JSON."""
    from steer.engines.base import SamplingParams
    from steer.fit.data.pairs import read_prompts
    from steer.fit.measure.plot import plot_dose_response
    from steer.fit.measure.sweep import dose_response

    doses = parse_strengths(strengths)
    chosen = None if layers is None else parse_layers(layers)
    place = None if where is None else where.value
    name, overlay = named_vector(vector)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, logprobs=0)
    with open_registry(registry, model) as library:
        scorer = scorer_of(score, library)
        asked: list[Prompt] = read_prompts(prompts)[:limit]
        with (
            running_engine(model, device=device, dtype=dtype) as engine,
            progress_bar("answers", len(asked) * (len(doses) + 1)) as done,
        ):
            cache = plans(engine, library)

            def plan_at(strength: float) -> SteeringPlan:
                return cache.plan(add_spec(name, strength, chosen, place), vectors=overlay)

            response = dose_response(
                engine, asked, plan_at, doses, scorer, sampling=sampling, examples=3, progress=done
            )
    title = f"{name}: {score} over {len(asked)} prompts"
    to_stdout = json_out is not None and str(json_out) == "-"
    if not to_stdout:
        show_doses(response, title)
    text = json.dumps({"vector": name, "score": score, **response.as_json()}, indent=2)
    picture = plot or Path(f"{name.split('@')[0]}-sweep.png")
    plot_dose_response(response, picture, title=title)
    if to_stdout:
        typer.echo(text)
        return
    out().print(f"wrote {picture}", highlight=False)
    if json_out is not None:
        write_file(json_out, text.encode() + b"\n")
        out().print(f"wrote {json_out}", highlight=False)


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


def parse_strengths(text: str) -> list[float]:
    """Comma-separated numbers; raises `SteerError`."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(abs(value) < float("inf") for value in found):
        raise SteerError(
            f"{text!r} is no list of strengths: write numbers such as 0.5,1,2",
            code="invalid_option",
        )
    return found
