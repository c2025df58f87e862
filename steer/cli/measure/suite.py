"""`steer evaluate --suite`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steer.cli.local import open_registry, plans, running_engine
from steer.cli.measure.scoring import scorer_of
from steer.cli.options import checked
from steer.cli.reporting import out, progress_bar, table_out
from steer.cli.steering import add_spec, named_vector, parse_strength, read_spec
from steer.errors import SteerError, UnknownArtefact

FIT = "fit:"
"""Before the name of a method that is fitted for each concept."""

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.fit.measure.suite.file import Suite, SuiteConcept
    from steer.fit.measure.suite.result import SuiteResult
    from steer.fit.measure.suite.run import PanelOf
    from steer.fit.measure.suite.way import WayOf
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
    suite = _part(read_suite(suite_path(values["suite"])), values)
    texts = values["methods"]
    report = values["report"]
    with open_registry(values["registry"], values["model"]) as library:
        request = checked(
            SuiteRequest,
            {
                "suite": suite.model_dump(),
                "methods": [_method(library, text, suite) for text in texts],
                "nulls": values["nulls"],
                "seed": values["seed"],
                "plain": values["plain"],
            },
        )
        if values["judge"] is None:
            request.check_scores()
        with (
            running_engine(
                values["model"], device=values["device"], dtype=values["dtype"], bulk=True
            ) as engine,
            progress_bar("answers", request.answers) as done,
        ):
            cache = plans(engine, library)
            found = request.run(
                engine,
                {
                    one.name: _ways(library, cache, text, suite)
                    for one, text in zip(request.methods, texts, strict=True)
                    if one.fit is None
                },
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


def _part(suite: Suite, values: dict[str, Any]) -> Suite:
    """What is run of a suite: the concepts that were named, in its own order, and as many prompts;
    told in another place, if one was given. Raises `SteerError` (`invalid_option`)."""
    from steer.fit.measure.suite.file import parse_suite

    named = [one.name for one in suite.concepts]
    given = values["concepts"]
    chosen = named if given is None else [one.strip() for one in given.split(",")]
    unknown = [one for one in chosen if one not in named]
    if unknown:
        raise SteerError(
            f"the suite {suite.name!r} has no concept {unknown[0]!r}: its concepts are "
            + ", ".join(named),
            code="invalid_option",
        )
    part = suite.model_dump()
    part["concepts"] = [one for one in part["concepts"] if one["name"] in chosen]
    part["prompts"] = part["prompts"][: values["limit"]]
    part["place"] = values["place"] or suite.place
    return parse_suite(part)


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


def _method(library: Registry, text: str, suite: Suite) -> dict[str, Any]:
    """The method that `text` names, as a request has it; a spec is the first concept's."""
    fit = _fit_named(text)
    if fit is not None:
        return {"name": _label(text), "fit": fit}
    with _explained(text, suite.concepts[0]):
        spec = _towards(library, text, suite.concepts[0])[1]
    return {"name": _label(text), "steering": spec.model_dump(mode="json", by_alias=True)}


def _fit_named(text: str) -> str | None:
    """The method that `fit:NAME` or `LABEL=fit:NAME` names; None for another way to steer."""
    _, _, named = text.rpartition("=")
    return named.removeprefix(FIT) if named.startswith(FIT) else None


def _ways(library: Registry, cache: PlanCache, text: str, suite: Suite) -> WayOf:
    """The ways to steer towards the concepts of `suite` that `text` stands for. Raises
    `SteerError`."""
    from steer.fit.measure.suite.way import Way, known_ways

    found = {}
    for concept in suite.concepts:
        with _explained(text, concept):
            _, spec, own = _towards(library, text, concept)
            found[concept.name] = Way.of(cache.plan(spec, vectors=own))
    return known_ways(found)


@contextmanager
def _explained(text: str, concept: SuiteConcept) -> Iterator[None]:
    """An artefact that is missing, with how to make it or do without."""
    try:
        yield
    except UnknownArtefact as error:
        raise UnknownArtefact(
            f"{error}. {text!r} needs one for each concept: make that of {concept.name!r} with "
            f"steer make {concept.instruction!r} --name NAME --register, or let the suite fit all "
            f"of them, with '{FIT}diffmean' in its place",
            code=error.code,
        ) from None


def _towards(
    library: Registry, text: str, concept: SuiteConcept
) -> tuple[str, SteeringSpec, dict[str, ControlVector]]:
    from steer.fit.requests.suite import CONCEPT

    return named_method(library, text.replace(CONCEPT, concept.name))


def _label(text: str) -> str:
    """A method's name in the table: before the equals sign, or what is left without `{concept}`."""
    from steer.fit.requests.suite import CONCEPT

    label, equals, _ = text.partition("=")
    if equals and label and ":" not in label:
        return label
    return text.removeprefix(FIT).replace(CONCEPT, "").strip("-_.: ") or "vector"


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
