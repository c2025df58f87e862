"""`steer calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import write_file
from steer.cli.local import open_registry, running_engine
from steer.cli.measure.asking import AS_JSON, REPORT, asked, parameters
from steer.cli.measure.scoring import scorer_of
from steer.cli.options import checked, command, keyword, read_values
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import vector_of
from steer.fit.requests.measuring import CalibrateRequest

if TYPE_CHECKING:
    from steer.fit.measure.calibrate import CalibratedVector
    from steer.registry.registry import Registry

_OWN = (
    keyword(
        "register",
        Annotated[
            bool,
            typer.Option(
                "--register", help="Make it the newest version of its name in the registry."
            ),
        ],
        False,
    ),
    keyword(
        "output",
        Annotated[
            Path | None,
            typer.Option("--out", "-o", help="The file to write; by default NAME.safetensors."),
        ],
        None,
    ),
    REPORT,
    AS_JSON,
)


def _calibrate(values: dict[str, Any]) -> None:
    from steer.fit.measure.report import write_calibration_report

    fields = read_values(CalibrateRequest, values)
    score, report = values["score"], values["report"]
    with open_registry(values["registry"], values["model"]) as library:
        plain = vector_of(library, values["vector"])
        name = plain.card.name
        scorer = None if score is None else scorer_of(score, library)
        fields |= {"vector": name, "prompts": asked(values)}
        request = checked(CalibrateRequest, fields)
        with (
            running_engine(
                values["model"], device=values["device"], dtype=values["dtype"], bulk=True
            ) as engine,
            progress_bar("answers", request.answers) as done,
        ):
            found = request.run(engine, plain, scorer, progress=done)
        if report is not None:
            write_calibration_report(report, found, title=f"{name}: {score or 'KL'}")
        kept = _kept(library, found, values["output"], values["register"])
    if values["as_json"]:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    show_calibration(found)
    if report is not None:
        out().print(f"wrote {report}", highlight=False)
    out().print(kept, highlight=False)


def _kept(library: Registry, found: CalibratedVector, output: Path | None, register: bool) -> str:
    """Registers or writes the calibrated vector; a line that says so."""
    name = found.vector.card.name
    if register:
        entry, created = library.add(name, found.vector)
        return f"{'registered' if created else 'already registered'}: {entry.id}"
    path = output or Path(f"{name}.safetensors")
    write_file(path, found.vector.to_bytes())
    return f"wrote {path}"


calibrate = command(
    _calibrate,
    tuple(parameters(CalibrateRequest, *_OWN)),
    summary="""Measure what each strength of a vector does, and write it onto the vector's card.

    A calibrated vector takes strengths as {"kl": x}, {"effect": x} and "auto".
    """,
)


def show_calibration(found: CalibratedVector) -> None:
    """One row per strength, those of the calibrated range marked, and what they come to."""
    from rich.table import Table

    from steer.fit.measure.nulls.comparison import told

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
    if one.nulls is not None:
        lines.append(told(one.nulls))
    if one.anti_steered is not None:
        wrong = one.anti_steered
        lines.append(
            f"steered the wrong way: {wrong.value:.2f} [{wrong.low:.2f}, {wrong.high:.2f}] of the "
            "prompts"
        )
    if any(found.unjudged):
        lines.append(f"answers that the scorer could not judge: {sum(found.unjudged)}")
    for line in lines:
        out().print(line, highlight=False)


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
