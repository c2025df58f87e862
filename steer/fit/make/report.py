"""What came out, for people: rows of a table, sentences, and a folder with a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steer.artefacts.calibration import MeasuredNull, NullKind
from steer.fit.make.made import Made
from steer.fit.make.plot import plot_made
from steer.fit.measure.bootstrap import Interval
from steer.fit.measure.report import cell, markdown_table, write_report


@dataclass(frozen=True)
class Row:
    """A row of the table, as text; `example` is an answer to the first question."""

    name: str
    score: str
    valid: str
    wrong_way: str
    cosine: str
    example: str = ""


def rows(found: Made) -> list[Row]:
    """The unsteered model, the words, the vector, and the nulls by kind."""
    table = [
        Row(
            row.name,
            str(row.score),
            "–" if row.valid is None else str(row.valid),
            "–" if row.name == "unsteered" else str(row.wrong_way),
            "",
            row.examples[0] if row.examples else "",
        )
        for row in found.check.rows
    ]
    by_kind: dict[NullKind, list[MeasuredNull]] = {}
    for null in found.check.comparison.nulls:
        by_kind.setdefault(null.kind, []).append(null)
    for kind, nulls in by_kind.items():
        scores = [one.score for one in nulls]
        cosines = [abs(one.cosine) for one in nulls]
        wrong = [one.anti_steered for one in nulls if one.anti_steered is not None]
        table.append(
            Row(
                f"chance: {kind}",
                f"{_mean(scores):.2f} (max {max(scores):.2f})",
                "–",
                f"{_mean(wrong):.2f}",
                f"{_mean(cosines):.2f} (max {max(cosines):.2f})",
            )
        )
    return table


def lines(found: Made) -> list[str]:
    """What was chosen, how sure it is, and what to know."""
    best, against = found.choice.best, found.check.comparison
    run_off = found.choice.run_off
    told = [
        f"told {found.place}: {found.obedience:.0%} of its answers are told from those with the "
        f"opposite; the words move it {found.said_kl:.2f} nats",
        f"chosen from {len(found.choice.trials)} trials"
        + (f", {len(run_off)} of them run again on more questions" if run_off else "")
        + f": layers {best.use.layers[0]}–{best.use.layers[-1]}, {best.use.where}, strength "
        f"{best.strength:.3g}, KL {best.kl:.2f} nats",
        f"over asking in words: {found.check.over_words}",
    ]
    if against.p_value is not None:
        count, margin = len(against.nulls), against.margin
        interval = "" if margin is None else Interval(margin.value, margin.low, margin.high)
        told.append(
            f"beside {count} vectors of chance of the same KL: p = {against.p_value:.3g}, over the "
            f"strongest {interval}"
        )
    verdict = "it steers" if found.works else "IT DOES NOT STEER: no more than chance does"
    return [*told, verdict if against.p_value is not None else "no chance was run", *found.notes]


def write_made_report(folder: Path, found: Made) -> None:
    """Writes `report.json`, `made.png` and `report.md` into `folder`, which is made if missing.
    Raises `SteerError` (`not_written`)."""
    write_report(
        folder, found.as_json(), _page(found), lambda: plot_made(found, folder / "made.png")
    )


def _page(found: Made) -> str:
    head = ["", "score", "valid", "wrong way", "cosine", "an answer"]
    cells = [
        [one.name, one.score, one.valid, one.wrong_way, one.cosine, cell(one.example)]
        for one in rows(found)
    ]
    said = "\n".join(f"- {line}" for line in lines(found))
    return (
        f"# {found.wish.name}\n\n“{found.wish.instruction}”\n\n![What it does](made.png)\n\n"
        f"{markdown_table(head, cells)}\n\n{said}\n"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
