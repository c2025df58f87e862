"""Reports: a folder with the figures as JSON, a picture, and a page that people can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.artefacts.calibration import MeasuredInterval, NullComparison
from steer.errors import SteerError
from steer.fit.measure.calibrate import CalibratedVector
from steer.fit.measure.evaluate import Evaluation
from steer.fit.measure.nulls.comparison import told
from steer.fit.measure.plot import plot_calibration, plot_evaluation

FIGURES = "report.json"
PAGE = "report.md"


def write_calibration_report(folder: Path, found: CalibratedVector, *, title: str) -> None:
    """Writes `report.json`, `calibration.png` and `report.md` into `folder`, which is made if
    missing. Raises `SteerError` (`not_written`)."""
    write_report(
        folder,
        found.as_json(),
        f"# {title}\n\n{_calibration_text(found)}\n\n![Dose and response](calibration.png)\n\n"
        f"{_calibration_table(found)}\n{_calibration_nulls(found.calibration.nulls)}",
        lambda: plot_calibration(
            found.calibration, folder / "calibration.png", title=title, auto=found.auto
        ),
    )


def write_evaluation_report(folder: Path, evaluation: Evaluation, *, title: str) -> None:
    """Writes `report.json`, `evaluation.png` and `report.md` into `folder`, as above."""
    write_report(
        folder,
        evaluation.as_json(),
        f"# {title}\n\n{_evaluation_text(evaluation)}\n\n![Scores](evaluation.png)\n\n"
        f"{_evaluation_table(evaluation)}\n\n{_evaluation_nulls(evaluation)}",
        lambda: plot_evaluation(evaluation, folder / "evaluation.png", title=title),
    )


def write_report(
    folder: Path, figures: Mapping[str, Any], page: str, plot: Callable[[], None]
) -> None:
    """Writes `figures` and `page` into `folder`, which is made if missing, then plots. Raises
    `SteerError` (`not_written`)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FIGURES).write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        (folder / PAGE).write_text(page)
    except OSError as error:
        raise SteerError(
            f"the report {str(folder)!r} cannot be written: {error.strerror}", code="not_written"
        ) from error
    plot()


def _calibration_text(found: CalibratedVector) -> str:
    one = found.calibration
    limits = one.limits
    lines = [
        f"Model {one.model}, layers {list(one.layers)} at {one.site}; {one.prompts} prompts "
        f"(sha256 {one.data_sha256[:12]}…), at most {one.max_tokens} tokens, temperature "
        f"{one.temperature:g}, seed {one.seed}; scorer {one.scorer or 'none'}.",
        f"Calibrated range: strengths 0 to **{one.safe_strength:g}** (KL 0 to {one.kl[-1]:.3g} "
        f"nats). It ends before the first strength with a perplexity ratio above "
        f"{limits.perplexity_ratio:g}, validity below {limits.valid:g}, or a score more than "
        f"{limits.drop:g} below an earlier one, or where measuring ended.",
    ]
    if found.auto is not None:
        lines.append(
            f'"auto" is strength **{found.auto:.3g}**. Over the range: R² {_text(one.linearity)}, '
            f"straightness {_text(one.straightness)}; over all strengths: Spearman's ρ "
            f"{_text(one.monotonicity)}."
        )
    if one.nulls is not None:
        lines.append(f"Beside chance: {told(one.nulls)}.")
    if one.anti_steered is not None:
        lines.append(f"Steered the wrong way: {_interval(one.anti_steered)} of the prompts.")
    return "\n\n".join(lines)


def _calibration_nulls(found: NullComparison | None) -> str:
    if found is None or not found.nulls:
        return ""
    return (
        f"\n## Nulls\n\nVectors of chance at the KL of strength {found.strength:g}.\n\n"
        f"{_null_table(found)}\n"
    )


def _null_table(found: NullComparison) -> str:
    """Every null, the strongest first."""
    rows = [
        [
            f"{one.kind} {one.seed}",
            f"{one.cosine:.2f}",
            f"{one.strength:.3g}",
            f"{one.kl:.4f}" + ("" if one.matched else " (not reached)"),
            f"{one.score:.3f}",
            _text(one.anti_steered),
        ]
        for one in sorted(found.nulls, key=lambda one: -one.score)
    ]
    return markdown_table(["null", "cosine", "strength", "KL (nats)", "score", "wrong way"], rows)


def _calibration_table(found: CalibratedVector) -> str:
    rows = []
    for place, dose in enumerate(found.calibration.doses):
        effect = found.calibration.effect
        share = effect[place] if effect is not None and place < len(effect) else None
        rows.append(
            [
                f"{dose.strength:g}" if place else "unsteered",
                _text(dose.score),
                _text(share),
                _text(dose.valid),
                f"{dose.perplexity_ratio:.3f}",
                f"{dose.kl:.4f}",
                cell(found.examples[place][0]) if found.examples[place] else "",
            ]
        )
    return markdown_table(
        ["strength", "score", "effect", "valid", "perplexity ratio", "KL (nats)", "an answer"], rows
    )


def _evaluation_text(evaluation: Evaluation) -> str:
    return (
        f"{evaluation.prompts} prompts, scorer {evaluation.scorer or 'unnamed'}; the prompt-only "
        f"baseline is told {evaluation.instruction}. Intervals: 95 %, bootstrap "
        f"over prompts, {evaluation.resamples} resamples, seed {evaluation.seed}."
    )


def _evaluation_table(evaluation: Evaluation) -> str:
    rows = [
        [
            cell(row.name),
            str(row.score),
            "–" if row.valid is None else str(row.valid),
            "–" if row.both is None else str(row.both),
            str(row.perplexity_ratio),
            str(row.over_prompt),
            "–" if row.kind == "unsteered" else str(row.anti_steered),
            cell(row.examples[0]) if row.examples else "",
        ]
        for row in evaluation.rows
    ]
    headings = ["method", "score", "valid", "both", "perplexity ratio", "over prompt"]
    return markdown_table([*headings, "wrong way", "an answer"], rows)


def _evaluation_nulls(evaluation: Evaluation) -> str:
    parts = ["## Nulls\n"]
    for row in evaluation.rows:
        if row.nulls is not None:
            parts.append(f"**{cell(row.name)}**: {told(row.nulls)}.\n\n{_null_table(row.nulls)}\n")
        elif row.no_nulls is not None:
            parts.append(f"**{cell(row.name)}**: {row.no_nulls}.\n")
    return "\n".join(parts)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _interval(found: MeasuredInterval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
