"""`steer evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.local import open_registry, plans, running_engine
from steer.cli.measure.asking import AS_JSON, REPORT, asked, parameters
from steer.cli.measure.scoring import scorer_of
from steer.cli.measure.suite import named_method, run_suite_command
from steer.cli.options import checked, command, keyword, read_values
from steer.cli.reporting import out, progress_bar, table_out
from steer.errors import SteerError
from steer.fit.requests.measuring import EvaluateRequest

if TYPE_CHECKING:
    from steer.artefacts.calibration import NullComparison
    from steer.artefacts.control_vector import ControlVector
    from steer.fit.measure.evaluate import Evaluation, Instruction
    from steer.registry.registry import Registry
    from steer.spec import SteeringSpec

_METHODS = keyword(
    "methods",
    Annotated[
        list[str],
        typer.Argument(
            help="What to compare: a vector (a name or a file), as its card says or with a "
            "strength after a colon (french:0.5, french:auto, french:kl=0.2), profile:NAME, or a "
            "JSON file with a spec. LABEL=… in front names the row."
        ),
    ],
)

_SUITE = (
    keyword(
        "suite",
        Annotated[
            str | None,
            typer.Option(
                help="Rate the methods on many concepts: a suite's file, or smollm2, which is "
                "shipped. {concept} in a method is each concept's name, and fit:NAME is fitted for "
                "each (diffmean, logistic, pca, psr, reps, low-rank); no --prompts and --score."
            ),
        ],
        None,
    ),
    keyword(
        "concepts",
        Annotated[
            str | None,
            typer.Option(help="With --suite: only these of its concepts, such as sea,money."),
        ],
        None,
    ),
    keyword(
        "judge",
        Annotated[
            str | None,
            typer.Option(
                help="With --suite: URL#model=NAME of an OpenAI-compatible judge (with the key in "
                "OPENAI_API_KEY); without it the served model and the concepts' scorers rate."
            ),
        ],
        None,
    ),
)


def _evaluate(values: dict[str, Any]) -> None:
    if values["suite"] is not None:
        run_suite_command(values)
        return
    for field in ("concepts", "judge"):
        if values[field] is not None:
            raise SteerError(f"--{field} is for a --suite: name one", code="invalid_option")
    for field, flag in (("prompts", "--prompts"), ("score", "--score")):
        if values[field] is None:
            raise SteerError(
                f"give {flag}, or a --suite, which brings its own", code="invalid_option"
            )
    from steer.fit.measure.report import write_evaluation_report

    score, report, texts = values["score"], values["report"], values.pop("methods")
    fields = read_values(EvaluateRequest, values)
    with open_registry(values["registry"], values["model"]) as library:
        scorer = scorer_of(score, library)
        fields["prompts"] = asked(values)
        named = [named_method(library, text) for text in texts]
        told = _instruction(library, values["instruction"], named)
        if values["place"] is not None:
            told = replace(told, place=values["place"])
        fields["instruction"] = told.text
        fields["methods"] = [
            {"name": name, "steering": spec.model_dump(mode="json", by_alias=True)}
            for name, spec, _ in named
        ]
        request = checked(EvaluateRequest, fields)
        with (
            running_engine(
                values["model"], device=values["device"], dtype=values["dtype"], bulk=True
            ) as engine,
            progress_bar("answers", request.answers) as done,
        ):
            cache = plans(engine, library)
            steered = [cache.plan(spec, vectors=own) for _, spec, own in named]
            found = request.run(engine, steered, scorer, told=told, progress=done)
    if report is not None:
        title = f"{score} over {len(request.prompts)} prompts"
        write_evaluation_report(report, found, title=title)
    if values["as_json"]:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    show_evaluation(found)
    if report is not None:
        out().print(f"wrote {report}", highlight=False)


evaluate = command(
    _evaluate,
    tuple(
        parameters(
            EvaluateRequest,
            *_SUITE,
            REPORT,
            AS_JSON,
            first=(_METHODS,),
            optional=("instruction", "prompts", "score"),
        )
    ),
    summary="Compare ways to steer on the same prompts, next to asking in words.",
)


def show_evaluation(found: Evaluation) -> None:
    """One row per method with its intervals, the unsteered model and the baseline first."""
    from rich.table import Table
    from rich.text import Text

    from steer.fit.measure.nulls.comparison import told

    table = Table(title=f"{found.scorer} over {found.prompts} prompts, 95 % intervals")
    table.add_column("method", no_wrap=True)
    headings = ("score", "valid", "both", "perplexity\nratio", "over prompt", "wrong way")
    for heading in (*headings, "best\nnull", "p"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(
            Text(row.name),
            str(row.score),
            "–" if row.valid is None else str(row.valid),
            "–" if row.both is None else str(row.both),
            str(row.perplexity_ratio),
            str(row.over_prompt),
            "–" if row.kind == "unsteered" else str(row.anti_steered),
            *_null_cells(row.nulls),
        )
    table_out().print(table)
    out().print(f"prompt only: told {found.instruction}", highlight=False, markup=False)
    for row in found.rows:
        said = row.no_nulls if row.nulls is None else told(row.nulls)
        if said is not None:
            out().print(f"{row.name}: {said}", highlight=False, markup=False)
    unjudged = sum(row.unjudged for row in found.rows)
    if unjudged:
        out().print(f"answers that the scorer could not judge: {unjudged}", highlight=False)


def _null_cells(found: NullComparison | None) -> tuple[str, str]:
    strongest = None if found is None else found.strongest
    if found is None or strongest is None:
        return "–", "–"
    return f"{strongest.score:.2f}", f"{found.p_value:.2g}"


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
