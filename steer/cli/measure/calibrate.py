"""`steer calibrate`."""

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
    running_engine,
)
from steer.cli.measure.scoring import SCORER_HELP, scorer_of
from steer.cli.measure.sweep import parse_strengths
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import WHERES, LayersOption, vector_of
from steer.model import parse_layers

if TYPE_CHECKING:
    from steer.fit.measure.calibrate import CalibratedVector

LimitOption = Annotated[
    float, typer.Option(help="The calibrated range ends before the ratio is greater.")
]


def calibrate(
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
    score: Annotated[
        str | None,
        typer.Option(
            "--score", "-s", help=SCORER_HELP + " Without it, only KL and perplexity are measured."
        ),
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(help="Comma-separated, above 0; by default 15, up to twice the card's own."),
    ] = None,
    model: ModelOption = DEMO_MODEL,
    layers: LayersOption = None,
    where: Annotated[
        WhereChoice | None, typer.Option(help="Which tokens are steered; by default the card's.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 200,
    max_perplexity_ratio: LimitOption = 1.5,
    min_valid: Annotated[
        float, typer.Option(min=0, max=1, help="And before fewer answers are valid.")
    ] = 0.8,
    max_drop: Annotated[
        float, typer.Option(min=0, help="And before the score falls by more than this.")
    ] = 0.05,
    max_tokens: Annotated[int, typer.Option(min=1, help="The length of an answer.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    register: Annotated[
        bool,
        typer.Option("--register", help="Make it the newest version of its name in the registry."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; by default NAME.safetensors."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A folder for report.json, a picture and a page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure what each strength of a vector does, and write it onto the vector's card.

    A calibrated vector takes strengths as {"kl": x}, {"effect": x} and "auto".
    """
    from steer.artefacts.calibration import SafeLimits
    from steer.fit.data.pairs import read_prompts
    from steer.fit.measure.calibrate import calibrate as calibrate_vector
    from steer.fit.measure.calibrate import steps_of
    from steer.fit.measure.report import write_calibration_report
    from steer.spec import Where

    doses = None if strengths is None else parse_strengths(strengths)
    chosen = None if layers is None else parse_layers(layers)
    place = None if where is None else Where.model_validate(WHERES[where.value])
    with open_registry(registry, model) as library:
        plain = vector_of(library, vector)
        scorer = None if score is None else scorer_of(score, library)
        asked = read_prompts(prompts)[:limit]
        with (
            running_engine(model, device=device, dtype=dtype) as engine,
            progress_bar("answers", steps_of(asked, doses)) as done,
        ):
            found = calibrate_vector(
                engine,
                plain,
                asked,
                scorer,
                scorer_name=score,
                strengths=doses,
                layers=chosen,
                where=place,
                limits=SafeLimits(
                    perplexity_ratio=max_perplexity_ratio, valid=min_valid, drop=max_drop
                ),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                progress=done,
            )
        name = plain.card.name
        if report is not None:
            write_calibration_report(report, found, title=f"{name}: {score or 'KL'}")
        if register:
            entry, created = library.add(name, found.vector)
            kept = f"{'registered' if created else 'already registered'}: {entry.id}"
        else:
            path = output or Path(f"{name}.safetensors")
            write_file(path, found.vector.to_bytes())
            kept = f"wrote {path}"
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    show_calibration(found)
    if report is not None:
        out().print(f"wrote {report}", highlight=False)
    out().print(kept, highlight=False)


def show_calibration(found: CalibratedVector) -> None:
    """One row per strength, those of the calibrated range marked, and what they come to."""
    from rich.table import Table

    one = found.calibration
    title = f"{found.vector.card.name}: {one.scorer or 'KL'} over {one.prompts} prompts"
    table = Table(title=title)
    for heading in ("strength", "score", "valid", "perplexity ratio", "KL", "effect", "safe"):
        table.add_column(heading, justify="right")
    for place, dose in enumerate(one.doses):
        inside = place < len(one.kl)
        effect = one.effect[place] if one.effect is not None and inside else None
        table.add_row(
            f"{dose.strength:g}" if place else "unsteered",
            _two(dose.score),
            _two(dose.valid),
            f"{dose.perplexity_ratio:.2f}",
            f"{dose.kl:.3f}",
            _two(effect),
            "●" if inside else "",
        )
    table_out().print(table)
    lines = [
        f"calibrated range: strength 0 to {one.safe_strength:g}, KL 0 to {one.kl[-1]:.3g} nats",
    ]
    if found.auto is not None:
        lines.append(
            f"auto: strength {found.auto:.3g}; R² {_two(one.linearity)}, straightness "
            f"{_two(one.straightness)}, Spearman {_two(one.monotonicity)}"
        )
    if abs(found.vector.card.default_strength) > one.safe_strength:
        lines.append(
            f"the card's default strength, {found.vector.card.default_strength:g}, is outside the "
            "calibrated range"
        )
    if any(found.unjudged):
        lines.append(f"answers that the scorer could not judge: {sum(found.unjudged)}")
    for line in lines:
        out().print(line, highlight=False)


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
