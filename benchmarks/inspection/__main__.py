"""Repeats the experiments: `python -m benchmarks.inspection next-token --model smollm2`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inspection import (
    attribute_report,
    attributes,
    contexts,
    detecting,
    next_token,
    onward_gates,
    token_steering,
)
from benchmarks.inspection.figure import draw
from benchmarks.inspection.readings import Curve
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.lens import Lens
from steer.cli.local import DEMO_MODEL, running_engine
from steer.engines.base import Engine
from steer.fit import fit_tuned_lens

app = typer.Typer(no_args_is_help=True, help=__doc__)
Model = Annotated[str, typer.Option(help="A model folder, or a name that steer knows.")]
Picture = Annotated[Path | None, typer.Option(help="Where to draw it.")]
Numbers = Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")]
LENS_TEXTS = 72


@app.command("next-token")
def next_tokens(
    model: Model,
    source: Annotated[list[str], typer.Option(help="docs or answers; may be repeated.")],
    count: Annotated[int, typer.Option(help="Contexts of each source.")] = 500,
    every: Annotated[int, typer.Option(min=1, help="Read every so many layers.")] = 1,
    lens: Annotated[Path | None, typer.Option(help="A lens's file; else one is fitted.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that a lens is trained for.")] = 0,
    png: Picture = None,
    numbers: Numbers = None,
) -> None:
    """The next token by layer: patchscope, logit lens and tuned lens, and the controls."""
    panels: list[tuple[str, list[Curve]]] = []
    with running_engine(model, device=None, dtype=None) as engine:
        for name in source:
            texts = contexts.SOURCES[name](engine)
            read = contexts.draw_contexts(texts.reading, count)
            tuned = _lens(engine, texts.fitting, lens, steps)
            layers = _layers(engine, every)
            curves, gains = next_token.measure(engine, read, tuned, layers)
            panels.append((f"next token, {count} contexts ({name})", curves))
            table = _table(panels[-1][0], curves)
            table.add_column("patchscope − tuned lens")
            table.columns[-1]._cells.extend(str(gain) for gain in gains.values())
            Console(width=200).print(table)
    _write(panels, png, numbers, surprisal=True)


@app.command("facts")
def facts(
    model: Model,
    every: Annotated[int, typer.Option(min=1, help="Read every so many layers.")] = 1,
    into: Annotated[
        int | None, typer.Option(help="Put states at this layer; by default the one that is read.")
    ] = None,
    png: Picture = None,
    numbers: Numbers = None,
) -> None:
    """An attribute of a subject and two hops, on facts that the model knows, and the controls."""
    panels: list[tuple[str, list[Curve]]] = []
    with running_engine(model, device=None, dtype=None) as engine:
        goals = {layer: layer if into is None else into for layer in _layers(engine, every)}
        for question in attributes.questions(engine):
            curves = attributes.measure(engine, question, goals)
            known = f"{len(question.answers)} of {question.asked} facts known"
            panels.append((f"{question.title}, {known}", curves))
            Console(width=200).print(_table(panels[-1][0], curves))
    _write(panels, png, numbers, surprisal=False)


@app.command("attributes")
def attribute_sweep(
    model: Model,
    prompts: Annotated[int, typer.Option(min=1, help="Subjects whose states are read.")] = 50,
    every: Annotated[int, typer.Option(min=1, help="Every so many layers, on both sides.")] = 1,
    length: Annotated[
        int, typer.Option("--tokens", min=1, max=256, help="Of what each cell says.")
    ] = 1,
    sample: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the pairs timed one by one.")
    ] = 0.05,
    turns: Annotated[int, typer.Option(min=1, help="Of chats alone and beside the sweep.")] = 3,
    turn_seconds: Annotated[float, typer.Option(min=0, help="Of each turn.")] = 20.0,
    chat_tokens: Annotated[int, typer.Option(min=2, help="Of each chat's answers.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Of the server, and of the one by one.")] = 2,
    numbers: Numbers = None,
) -> None:
    """Every source layer × target layer over HTTP, beside the same cells one by one as the method's
    authors run them, and what chats on the same server feel meanwhile."""
    asked = attribute_report.Asked(
        prompts, every, length, sample, turns, turn_seconds, chat_tokens, threads
    )
    try:
        found = attribute_report.measure(model, asked)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    attribute_report.show(model, found, Console(width=150))
    if numbers is not None:
        made = attribute_report.as_json(model, asked, found)
        numbers.write_text(json.dumps(made, indent=1) + "\n")


@app.command("tokens")
def tokens(
    model: Model,
    layer: Annotated[list[int], typer.Option(help="Where; may be repeated.")],
    lens: Annotated[
        list[Path] | None, typer.Option(help="A lens's file, beside the logit lens.")
    ] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Shares of the states' length to add.")
    ] = None,
    added: Annotated[bool, typer.Option(help="Measure what is added, too.")] = True,
    most: Annotated[int, typer.Option(help="The most facts.")] = 24,
) -> None:
    """A token's direction added, ablated and exchanged, on facts that the model knows."""
    lenses: dict[str, Lens | None] = {"logit": None}
    for path in lens or ():
        lenses[path.stem] = Lens.from_bytes(path.read_bytes())
    with running_engine(model, device=None, dtype=None) as engine:
        shares = (share or [0.1, 0.2, 0.4]) if added else []
        known, rows = token_steering.measure(engine, lenses, layer, shares, most)
    table = Table(*token_steering.Row._fields, title=f"{known} facts")
    for row in rows:
        told = (one if isinstance(one, str) else f"{one:.3f}" for one in row)
        table.add_row(*told)
    Console(width=200).print(table)


@app.command("texts")
def texts(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write them, one a line.")],
    source: Annotated[str, typer.Option(help="docs or answers.")] = "docs",
    most: Annotated[int, typer.Option(help="The most texts.")] = 120,
) -> None:
    """Texts to fit a lens on, for `steer fit`: none that contexts are drawn from."""
    with running_engine(model, device=None, dtype=None) as engine:
        pieces = contexts.SOURCES[source](engine).fitting[:most]
        lines = [json.dumps(engine.tokenizer.decode(tokens)) for tokens in pieces]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


@app.command("detectors")
def detectors(
    model: Model,
    data: Annotated[
        Path | None, typer.Option(help="The demo model's folder of pairs, for that model.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="The length of an answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws answers, and parts the texts.")] = 0,
) -> None:
    """What detectors tell apart, how often they fire for nothing, and at which token."""
    with running_engine(model, device=None, dtype=None) as engine:
        rows = detecting.measure(engine, data, tokens, seed)
    table = Table(*detecting.Row._fields, title=f"detectors of {model}")
    for row in rows:
        table.add_row(*row)
    Console(width=260).print(table)


@app.command("onward")
def onward(
    data: Annotated[Path, typer.Option(help="The demo model's folder of pairs.")] = Path(
        "vectors/demo/data"
    ),
    vector: Annotated[Path, typer.Option(help="What is added: its vector of German.")] = Path(
        "vectors/demo/vectors/german.safetensors"
    ),
) -> None:
    """Gates that stay open from a token on, beside those that each token opens; the demo model."""
    german = ControlVector.from_bytes(vector.read_bytes())
    with running_engine(DEMO_MODEL, device=None, dtype=None) as engine:
        rows, openings = onward_gates.measure(engine, data, german)
    table = Table(*onward_gates.Row._fields, title="what is changed, and made German")
    for row in rows:
        table.add_row(*row)
    places = Table(
        *onward_gates.Opening._fields, title="where a gate opens, of the first French token"
    )
    for place in openings:
        places.add_row(*place)
    Console(width=200).print(table, places)


def _lens(engine: Engine, texts: Sequence[contexts.Tokens], path: Path | None, steps: int) -> Lens:
    if path is not None:
        return Lens.from_bytes(path.read_bytes())
    prompts = [engine.tokenizer.decode(tokens) for tokens in texts[:LENS_TEXTS]]
    return fit_tuned_lens(engine, prompts, name="contexts", steps=steps)


def _layers(engine: Engine, every: int) -> list[int]:
    """Each `every`-th layer, the last one among them."""
    last = engine.info.n_layers - 1
    return list(range(last % every, last + 1, every))


def _table(title: str, curves: Sequence[Curve]) -> Table:
    """precision@1 of every curve, a row for each layer."""
    layers = max((curve.layers for curve in curves), key=len)
    table = Table("layer", *(curve.name for curve in curves), title=f"precision@1: {title}")
    for n, layer in enumerate(layers):
        shares = (curve.precision[min(n, len(curve.precision) - 1)] for curve in curves)
        table.add_row(str(layer), *map(str, shares))
    return table


def _write(
    panels: Sequence[tuple[str, Sequence[Curve]]],
    png: Path | None,
    numbers: Path | None,
    *,
    surprisal: bool,
) -> None:
    if numbers is not None:
        found = {title: [one.model_dump() for one in curves] for title, curves in panels}
        numbers.write_text(json.dumps(found, indent=1) + "\n")
    if png is not None:
        draw(panels, png, surprisal=surprisal)


if __name__ == "__main__":
    app()
