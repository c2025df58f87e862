"""A suite's result as a folder: figures, a picture, and a page that people can read."""

from __future__ import annotations

from pathlib import Path

from steer.fit.measure.plot import NULL, new_figure, save_figure
from steer.fit.measure.report import cell, markdown_table, write_report
from steer.fit.measure.suite.result import ANCHORS, MethodSummary, SuiteResult

HEADINGS = ("method", "concept", "instruction", "fluency", "overall", "nulls", "above nulls")
COLOURS = {"unsteered": "#999999", "prompt": "#e9a23b", "steering": "C0"}


def write_suite_report(folder: Path, found: SuiteResult) -> None:
    """Writes `report.json`, `suite.png` and `report.md` into `folder`, which is made if missing.
    Raises `SteerError` (`not_written`)."""
    rows = [summary_cells(one) for one in found.summaries]
    page = (
        f"# {found.suite} on {found.model}\n\n{suite_text(found)}\n\n![Overall](suite.png)\n\n"
        f"{markdown_table(HEADINGS, rows)}\n\n## Concepts\n\n{_concepts(found)}\n"
    )
    write_report(folder, found.as_json(), page, lambda: plot_suite(found, folder / "suite.png"))


def suite_text(found: SuiteResult) -> str:
    """How the figures came about, in a few sentences."""
    anchors = ", ".join(f"{name} {value}" for name, value in ANCHORS.items())
    return (
        f"{len(found.concepts)} concepts, {found.prompts} prompts, of which every second chose the "
        f"factor and the others are rated, 0 to 2, by the {found.panel}. Overall is the mean of "
        "the answers' harmonic means, with a 95 % bootstrap interval over concepts. Nulls: vectors "
        "of chance in the vector's place, at its KL. Published on other models, concepts and "
        f"judges (AxBench): {anchors}."
    )


def summary_cells(one: MethodSummary) -> tuple[str, ...]:
    """A row under `HEADINGS`."""
    return (
        cell(one.method),
        f"{one.concept:.2f}",
        f"{one.instruction:.2f}",
        f"{one.fluency:.2f}",
        str(one.overall),
        "–" if one.null is None else f"{one.null:.2f}",
        "–" if one.above_null is None else f"{one.above_null:.2f}",
    )


def plot_suite(found: SuiteResult, path: Path) -> None:
    """A bar for each way to steer, a dot for each concept, a cross for the mean of its nulls.
    Raises `SteerError`."""
    summaries = found.summaries
    figure = new_figure(1.8 + 0.5 * len(summaries))
    axis = figure.subplots()
    places = range(len(summaries))
    overall = [one.overall for one in summaries]
    axis.barh(
        places,
        [one.value for one in overall],
        xerr=[
            [one.value - one.low for one in overall],
            [one.high - one.value for one in overall],
        ],
        color=[COLOURS[one.kind] for one in summaries],
        alpha=0.7,
        capsize=3,
        label="overall",
    )
    dots = [(row.overall, place) for one in found.concepts for place, row in enumerate(one.rows)]
    axis.plot(*zip(*dots, strict=True), "o", color="black", ms=3, ls="none", label="a concept")
    nulls = [(one.null, place) for place, one in enumerate(summaries) if one.null is not None]
    if nulls:
        axis.plot(*zip(*nulls, strict=True), "x", **NULL, label="nulls, equal KL")
    axis.set_yticks(places, [one.method for one in summaries])
    axis.invert_yaxis()
    axis.set(xlabel="overall, 0 to 2", xlim=(0, 2.03), title=f"{found.suite} on {found.model}")
    axis.legend()
    save_figure(figure, path)


def _concepts(found: SuiteResult) -> str:
    rows = []
    for one in found.concepts:
        for row in one.rows:
            strongest = None if row.nulls is None else row.nulls.strongest
            rows.append(
                (
                    one.concept,
                    cell(row.method),
                    "–" if row.factor is None else f"{row.factor:g}",
                    f"{row.overall:.2f}",
                    "–" if strongest is None else f"{strongest.score:.2f} ({strongest.kind})",
                    "–"
                    if row.nulls is None or row.nulls.p_value is None
                    else f"{row.nulls.p_value:.2g}",
                    cell(row.example),
                )
            )
    headings = ("concept", "method", "factor", "overall", "strongest null", "p", "an answer")
    return markdown_table(headings, rows)
