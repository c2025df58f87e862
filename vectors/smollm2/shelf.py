"""What is kept of what was made, and the page that shows all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.fit.make.made import Made

REPORTS = "reports"
MIN_VALID = 0.9
MIN_MARGIN = 0.3
"""What a vector has over the mean of every kind of null, to be shipped."""

_HEAD = """# Vectors and an SAE for SmolLM2-135M-Instruct

Each was made by one command from one sentence, and is served as `smollm2:NAME` and as the vector
`NAME` wherever `--model smollm2` is. `python -m steer_vectors.smollm2.recipe` makes them again.

The score of an answer is how much likelier the instruction makes it, beside what unsteered answers
have ([docs/making.md](../../docs/making.md)); 20 questions that nothing was fitted or chosen on,
95 % intervals. *Chance* is the mean over seven vectors of each kind at the same KL (the highest of
the 21 in brackets): rotated, with the states' covariance, fitted on shuffled labels.

The SAE `resid-14` has 4,096 features of the residual stream after block 14, labelled by the tokens
that they fire on ([how it was trained](../../docs/training-saes.md#smollm2s-own),
[what features are for](../../docs/features.md)); `python -m steer_vectors.smollm2.sae` makes it
again.

"""


def keep(folder: Path, made: Made) -> None:
    """Writes the vector on the layers that it uses, and its profile, if it passed."""
    if not passed(made.as_json()):
        return
    name = made.wish.name
    vector = made.vector.on_layers(made.vector.card.used_layers)
    for part in ("vectors", "profiles"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "vectors" / f"{name}.safetensors").write_bytes(vector.to_bytes())
    rows = {row.name: row for row in made.check.rows}
    profile = {
        "name": name,
        "spec": {"interventions": [{"kind": "add", "vector": name}]},
        "description": (
            f"{made.wish.instruction} Held out: score {rows['steered'].score.value:.2f}, in words "
            f"{rows['in words'].score.value:.2f}, unsteered {rows['unsteered'].score.value:.2f}."
        ),
    }
    text = json.dumps(profile, indent=2, ensure_ascii=False) + "\n"
    (folder / "profiles" / f"{name}.json").write_text(text, "utf-8")


def passed(report: Mapping[str, Any]) -> bool:
    """Whether a vector is shipped: more than chance, by `MIN_MARGIN` over the mean of every kind,
    and `MIN_VALID` of its answers sound."""
    if "refused" in report:
        return False
    [_, _, steered] = report["check"]["rows"]
    means = _chance(report).values()
    return bool(
        report["works"]
        and steered["valid"]["value"] >= MIN_VALID
        and steered["score"]["value"] - max(means) >= MIN_MARGIN
    )


def write_page(folder: Path) -> None:
    """Writes README.md from the reports."""
    reports = {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in sorted((folder / REPORTS).glob("*.json"))
    }
    head = "| | told | unsteered | in words | steered | sound | chance | p | use | shipped |"
    lines = [head, "|" + "---|" * 10]
    lines += [f"| `{name}` | {_cells(report)} |" for name, report in reports.items()]
    answers = [f"| {name} | {_example(report)} |" for name, report in reports.items()]
    page = "\n".join([*lines, "", "| | to the first question |", "|---|---|", *answers])
    (folder / "README.md").write_text(_HEAD + page + "\n", "utf-8")


def _cells(report: Mapping[str, Any]) -> str:
    if "refused" in report:
        return f"“{report['instruction']}” | | | | | | | refused: {report['refused']} | no"
    unsteered, told, steered = (_interval(row["score"]) for row in report["check"]["rows"])
    nulls = report["check"]["nulls"]
    highest = max(one["score"] for one in nulls["nulls"])
    use = report["chosen"]["use"]
    cells = [
        f"“{report['instruction']}”, {report['place']}",
        unsteered,
        told,
        f"**{steered}**",
        f"{report['check']['rows'][2]['valid']['value']:.2f}",
        ", ".join(f"{mean:.2f}" for mean in _chance(report).values()) + f" ({highest:.2f})",
        f"{nulls['p_value']:.2g}",
        f"{use['layers'][0]}–{use['layers'][-1]}, {use['where']}, "
        f"{report['chosen']['strength']:.2g}",
        "yes" if passed(report) else "no",
    ]
    return " | ".join(cells)


def _chance(report: Mapping[str, Any]) -> dict[str, float]:
    """The mean score of the nulls of each kind."""
    by_kind: dict[str, list[float]] = {}
    for null in report["check"]["nulls"]["nulls"]:
        by_kind.setdefault(null["kind"], []).append(null["score"])
    return {kind: sum(scores) / len(scores) for kind, scores in by_kind.items()}


def _example(report: Mapping[str, Any]) -> str:
    if "refused" in report:
        return "–"
    return str(report["check"]["rows"][2]["examples"][0]).replace("|", "\\|").replace("\n", " ")


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
