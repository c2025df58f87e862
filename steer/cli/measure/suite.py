"""`steer evaluate --suite`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steer.cli.local import open_registry, plans, running_engine
from steer.cli.measure.scoring import scorer_of
from steer.cli.options import checked
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import add_spec, named_vector, parse_strength, read_spec
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.fit.measure.suite.file import SuiteConcept
    from steer.fit.measure.suite.result import SuiteResult
    from steer.fit.measure.suite.run import PanelOf, PlanOf
    from steer.plan.cache import PlanCache
    from steer.registry.registry import Registry
    from steer.spec import SteeringSpec


def run_suite_command(values: dict[str, Any]) -> None:
    """What `steer evaluate` does with a suite: runs it, shows its table, writes its report. A run
    into the same `--report` folder goes on where the last one was stopped."""
    from steer.fit.measure.suite.file import read_suite
    from steer.fit.measure.suite.report import write_suite_report
    from steer.fit.requests.suite import SuiteRequest

    _check(values)
    suite, texts = read_suite(suite_path(values["suite"])), values["methods"]
    report = values["report"]
    with open_registry(values["registry"], values["model"]) as library:
        first = suite.concepts[0].name
        request = checked(
            SuiteRequest,
            {
                "suite": suite.model_dump(),
                "methods": [
                    {
                        "name": _label(text),
                        "steering": _towards(library, text, first)[1].model_dump(
                            mode="json", by_alias=True
                        ),
                    }
                    for text in texts
                ],
                "nulls": values["nulls"],
                "seed": values["seed"],
                "plain": values["plain"],
            },
        )
        if values["judge"] is None:
            request.check_scores()
        with (
            running_engine(
                values["model"], device=values["device"], dtype=values["dtype"]
            ) as engine,
            progress_bar("answers", request.answers) as done,
        ):
            cache = plans(engine, library)
            found = request.run(
                engine,
                {_label(text): _plan_of(library, cache, text) for text in texts},
                scorers={
                    one.name: scorer_of(one.score, library)
                    for one in suite.concepts
                    if one.score is not None and values["judge"] is None
                },
                panel_of=None if values["judge"] is None else _judge(values["judge"]),
                folder=report,
                progress=done,
            )
    if report is not None:
        write_suite_report(report, found)
    if values["as_json"]:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return
    show_suite(found)
    if report is not None:
        out().print(f"wrote {report}", highlight=False)


def suite_path(named: str) -> Path:
    """The file of a suite: as named, or of the shipped one of that name."""
    from steer_vectors import LIBRARY

    path, shipped = Path(named), Path(LIBRARY) / "suites" / f"{named}.json"
    return shipped if not path.exists() and path.name == named and shipped.is_file() else path


def show_suite(found: SuiteResult) -> None:
    """One row per method over all concepts, and how it came about."""
    from rich.table import Table
    from rich.text import Text

    from steer.fit.measure.suite.report import HEADINGS, suite_text, summary_cells

    table = Table(title=f"{found.suite} on {found.model}, 0 to 2")
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for one in found.summaries:
        table.add_row(*map(Text, summary_cells(one)))
    table_out().print(table)
    out().print(suite_text(found), highlight=False, markup=False)


def named_method(
    library: Registry, text: str
) -> tuple[str, SteeringSpec, dict[str, ControlVector]]:
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


def _plan_of(library: Registry, cache: PlanCache, text: str) -> PlanOf:
    """The plan towards a concept that `text`, with `{concept}` in it, stands for."""

    def plan(concept: SuiteConcept) -> Any:
        _, spec, own = _towards(library, text, concept.name)
        return cache.plan(spec, vectors=own)

    return plan


def _towards(
    library: Registry, text: str, concept: str
) -> tuple[str, SteeringSpec, dict[str, ControlVector]]:
    from steer.fit.requests.suite import CONCEPT

    return named_method(library, text.replace(CONCEPT, concept))


def _label(text: str) -> str:
    """A method's name in the table: before the equals sign, or what is left without `{concept}`."""
    from steer.fit.requests.suite import CONCEPT

    label, equals, _ = text.partition("=")
    if equals and label and ":" not in label:
        return label
    return text.replace(CONCEPT, "").strip("-_.: ") or "vector"


def _judge(text: str) -> PanelOf:
    """The panel that `URL#model=NAME` stands for. Raises `SteerError`."""
    from steer.fit.measure.scorers import judge_place
    from steer.fit.measure.suite.judged import JudgePanel

    url, model = judge_place(text)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return lambda prompts, _: JudgePanel(url, model, prompts, api_key=key)


def _check(values: dict[str, Any]) -> None:
    for field in ("prompts", "score", "instruction"):
        if values[field] is not None:
            raise SteerError(
                f"--{field} and --suite exclude each other: a suite brings its own",
                code="invalid_option",
            )
