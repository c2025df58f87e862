"""`steer evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from steer.cli.steering import add_spec, named_vector, parse_strength, read_spec
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.fit.measure.evaluate import Evaluation, Instruction
    from steer.registry.registry import Registry
    from steer.spec import SteeringSpec


def evaluate(
    methods: Annotated[
        list[str],
        typer.Argument(
            help="What to compare: a vector (a name or a file), as its card says or with a "
            "strength after a colon (french:0.5, french:auto, french:kl=0.2), profile:NAME, or a "
            "JSON file with a spec. LABEL=… in front names the row."
        ),
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
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            "-i",
            help="What the prompt-only baseline is told; by default the first vector's card.",
        ),
    ] = None,
    model: ModelOption = DEMO_MODEL,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="The length of an answer.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Draws the bootstrap, and samples above 0.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap over prompts.")] = 2000,
    report: Annotated[
        Path | None, typer.Option(help="A folder for report.json, a picture and a page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compare ways to steer on the same prompts, next to asking in words."""
    from steer.fit.data.pairs import read_prompts
    from steer.fit.measure.evaluate import Method
    from steer.fit.measure.evaluate import evaluate as compare
    from steer.fit.measure.report import write_evaluation_report

    with open_registry(registry, model) as library:
        scorer = scorer_of(score, library)
        asked = read_prompts(prompts)[:limit]
        named = [_method(library, text) for text in methods]
        told = _instruction(library, instruction, named)
        with (
            running_engine(model, device=device, dtype=dtype) as engine,
            progress_bar("answers", len(asked) * (2 + len(named))) as done,
        ):
            cache = plans(engine, library)
            found = compare(
                engine,
                asked,
                [Method(name, cache.plan(spec, vectors=own)) for name, spec, own in named],
                scorer,
                instruction=told,
                scorer_name=score,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                resamples=resamples,
                progress=done,
            )
    if report is not None:
        write_evaluation_report(report, found, title=f"{score} over {len(asked)} prompts")
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    show_evaluation(found)
    if report is not None:
        out().print(f"wrote {report}", highlight=False)


def show_evaluation(found: Evaluation) -> None:
    """One row per method with its intervals, the unsteered model and the baseline first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{found.scorer} over {found.prompts} prompts, 95 % intervals")
    table.add_column("method", no_wrap=True)
    for heading in ("score", "valid", "both", "perplexity\nratio", "over prompt"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(
            Text(row.name),
            str(row.score),
            "–" if row.valid is None else str(row.valid),
            "–" if row.both is None else str(row.both),
            str(row.perplexity_ratio),
            str(row.over_prompt),
        )
    table_out().print(table)
    told = found.instruction
    out().print(f"prompt only: told “{told.text}” ({told.source})", highlight=False, markup=False)
    unjudged = sum(row.unjudged for row in found.rows)
    if unjudged:
        out().print(f"answers that the scorer could not judge: {unjudged}", highlight=False)


def _method(library: Registry, text: str) -> tuple[str, SteeringSpec, dict[str, ControlVector]]:
    """A row's name, its spec, and vectors that come from files."""
    label, equals, rest = text.partition("=")
    if not equals or ":" in label or not label:
        label, rest = "", text
    if rest.startswith("profile:"):
        return label or rest, library.profile(rest.removeprefix("profile:")).spec, {}
    if rest.endswith(".json"):
        return label or Path(rest).stem, read_spec(Path(rest)), {}
    ref, colon, strength = rest.rpartition(":") if ":" in rest else (rest, "", "")
    name, own = named_vector(ref)
    value = parse_strength(strength) if colon else None
    shown = f"{name}:{strength}" if colon else name
    return label or shown, add_spec(name, value, None, None), own


def _instruction(
    library: Registry,
    given: str | None,
    named: Sequence[tuple[str, SteeringSpec, dict[str, ControlVector]]],
) -> Instruction:
    """What was given, or what the first vector with such a card says. Raises `SteerError`."""
    from steer.fit.measure.evaluate import Instruction, card_instruction

    if given is not None:
        return Instruction(given)
    for _, spec, own in named:
        for item in spec.interventions:
            ref = getattr(item, "vector", None)
            if isinstance(ref, str):
                vector = own[ref] if ref in own else library.vector(ref)
                found = card_instruction(vector.card)
                if found is not None:
                    return found
    raise SteerError(
        "no card says how to ask for this in words: give the prompt-only baseline an --instruction",
        code="invalid_option",
    )
