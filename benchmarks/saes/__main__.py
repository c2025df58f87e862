"""What features of an SAE do: `python -m benchmarks.saes doses --model smollm2 --sae resid-14`.

Speed is another matter: `python -m benchmarks saes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.saes import concepts, doses, intervention, memory, steerer
from benchmarks.saes.setting import (
    FOLDER,
    Options,
    Setting,
    clear_features,
    opened,
    write_figures,
)
from steer.fit.features.effect import EffectOptions

app = typer.Typer(no_args_is_help=True, help=__doc__)
Model = Annotated[str, typer.Option(help="A model folder, or a name that steer knows.")]
Name = Annotated[str, typer.Option(help="An SAE of that model, by its name.")]
Registry = Annotated[str | None, typer.Option(help="The registry's folder; by default steer's.")]
Dtype = Annotated[str, typer.Option(help="What the model computes in.")]
Threads = Annotated[int, typer.Option(help="torch threads.")]
Seed = Annotated[int, typer.Option(help="Draws questions, features, nulls and answers.")]
Out = Annotated[Path, typer.Option(help="The folder of the figures and of what was asked.")]
Named = Annotated[
    list[int] | None,
    typer.Option("--feature", help="By number; by default drawn from those with a clear label."),
]
Count = Annotated[int, typer.Option(help="Features that are drawn.")]
Questions = Annotated[int, typer.Option(help="Neutral questions that are asked.")]
Tokens = Annotated[int, typer.Option(help="The length of an answer.")]
Nulls = Annotated[int, typer.Option(help="Directions of chance of each kind.")]


@app.command("intervention")
def interventions(
    model: Model = "smollm2",
    sae: Name = "resid-14",
    feature: Named = None,
    count: Count = 24,
    kl: Annotated[float, typer.Option(help="Nats that features are raised to.")] = 0.3,
    nulls: Nulls = 10,
    questions: Questions = 8,
    tokens: Tokens = 24,
    pointed: Annotated[
        bool, typer.Option(help="Also labels that name the tokens that decoder rows point to.")
    ] = True,
    seed: Seed = 0,
    registry: Registry = None,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    out: Out = FOLDER,
) -> None:
    """Labels against those of other features: how much likelier the raised feature makes each."""
    options = Options(model, sae, registry, dtype, threads, seed, out)
    with opened(options, "intervention") as setting:
        chosen = _features(setting, feature, count)
        found = intervention.measure(
            setting,
            chosen,
            EffectOptions(kl=kl, nulls=nulls, max_tokens=tokens, seed=seed),
            questions,
            pointed=pointed,
        )
        _show("labels", intervention.HEADINGS, intervention.lines(found))
        setting.write("intervention", found)


@app.command("doses")
def dose_response(
    model: Model = "smollm2",
    sae: Name = "resid-14",
    feature: Named = None,
    count: Count = 12,
    nulls: Nulls = 10,
    questions: Questions = 6,
    tokens: Tokens = 16,
    seed: Seed = 0,
    registry: Registry = None,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    out: Out = FOLDER,
) -> None:
    """A feature's effect on the tokens it points to, at six doses, beside chance at equal KL."""
    options = Options(model, sae, registry, dtype, threads, seed, out)
    with opened(options, "doses") as setting:
        chosen = _features(setting, feature, count)
        found = doses.measure(
            setting, chosen, EffectOptions(nulls=nulls, max_tokens=tokens, seed=seed), questions
        )
        _show("effect (strongest null) by KL, nats", doses.HEADINGS, doses.lines(found))
        setting.write("doses", found)


Attributes = Annotated[
    list[str] | None,
    typer.Option("--vector", help="Made by `steer make`; its card says what is asked for."),
]
NAMES = ("cheerful", "academic", "advert")


@app.command("concepts")
def concept_table(
    model: Model = "smollm2",
    sae: Name = "resid-14",
    vector: Attributes = None,
    nulls: Nulls = 10,
    fitted: Annotated[int, typer.Option(help="Questions that features are looked for on.")] = 32,
    questions: Questions = 20,
    tokens: Tokens = 24,
    seed: Seed = 0,
    registry: Registry = None,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    out: Out = FOLDER,
) -> None:
    """Features against the vector, words and chance at one KL, for each attribute."""
    options = Options(model, sae, registry, dtype, threads, seed, out)
    for name in vector or NAMES:
        with opened(options, f"concepts-{name}") as setting:
            found = concepts.measure(
                setting, name, fitted=fitted, questions=questions, tokens=tokens, nulls=nulls
            )
            _show(f"{name}: {questions} questions", concepts.HEADINGS, concepts.lines(found))
            setting.write(f"concepts-{name}", found)


@app.command("steerer")
def concept_steerer(
    model: Model = "smollm2",
    sae: Name = "resid-14",
    vector: Attributes = None,
    kl: Annotated[float, typer.Option(help="Nats of the strongest dose.")] = 1.0,
    questions: Questions = 20,
    tokens: Tokens = 24,
    seed: Seed = 0,
    registry: Registry = None,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    out: Out = FOLDER,
) -> None:
    """Concept Steerers' check: attribute rates over strengths of the attribute's text."""
    options = Options(model, sae, registry, dtype, threads, seed, out)
    with opened(options, "steerer") as setting:
        found = steerer.measure(setting, vector or NAMES, questions=questions, tokens=tokens, kl=kl)
        _show("points of 100 by strength", steerer.HEADINGS, steerer.lines(found))
        setting.write("steerer", found)


@app.command("memory")
def memory_of_ten(
    count: Annotated[int, typer.Option(help="SAEs.")] = 10,
    latents: Annotated[int, typer.Option(help="Features of each.")] = 65_536,
    width: Annotated[int, typer.Option(help="Of the model, which is small and random.")] = 2048,
    labelled: Annotated[int, typer.Option(help="Features of each that have a label.")] = 4096,
    out: Out = FOLDER,
) -> None:
    """What loaded SAEs keep in memory. Files of 4 · latents · width bytes each, deleted after."""
    found = memory.measure(count=count, latents=latents, width=width, labelled=labelled)
    size = f"{found['MiB of a file']:.0f} MiB each on disk"
    _show(f"{count} SAEs, {size}", memory.HEADINGS, memory.lines(found))
    write_figures(out / "memory.json", {"machine": machine(("torch", "steer-llm")), **found})


def _features(setting: Setting, named: list[int] | None, count: int) -> list[int]:
    return named or clear_features(setting.labels, count, setting.options.seed)


def _show(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=220).print(table)


if __name__ == "__main__":
    app()
