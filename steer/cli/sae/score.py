"""`steer sae score`: how good are the labels of features?"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter
from typing import TYPE_CHECKING, Any

import typer

from steer.cli.measure.asking import AS_JSON
from steer.cli.options import MODEL, PLACE, checked, command, keyword, options, read_values
from steer.cli.reporting import progress_bar
from steer.cli.sae.effect import FEATURES, PROMPTS, asked_in
from steer.cli.sae.labels import LabellerOption, labeller_at, say_cost
from steer.cli.sae.place import working
from steer.cli.sae.tables import chance_of, number, say, table
from steer.fit.requests.features.score import ScoreRequest

if TYPE_CHECKING:
    from steer.registry.features.scores import LabelScores, PredictionScore, ScoredLabels


def _parameters() -> Iterator[Parameter]:
    sae, *fields = options(ScoreRequest, leave_out=("features",))
    yield sae
    yield FEATURES
    yield keyword("labeller", LabellerOption, None)
    yield PROMPTS
    yield MODEL
    yield from fields
    yield AS_JSON
    yield from PLACE


def _score(values: dict[str, Any]) -> None:
    fields = {**read_values(ScoreRequest, values), **asked_in(values.pop("prompts"))}
    request = checked(ScoreRequest, fields)
    labeller = labeller_at(values["labeller"])
    with working(**values) as (engine, library):
        request.check(engine, library)
        with progress_bar("answers", request.work(engine)) as done:
            found = request.run(engine, library, labeller, progress=done)
    if values["as_json"]:
        typer.echo(found.model_dump_json(indent=2, exclude_none=True))
        return
    show_scores(found)
    say_cost(labeller)


SCORE = command(
    _score,
    tuple(_parameters()),
    summary="Score the labels of features: what they predict, and what raising the features does.",
)


def show_scores(found: ScoredLabels) -> None:
    """One row a feature, and how the labels do together."""
    rows = [
        (
            str(one.feature),
            one.label,
            _gain(one),
            _balanced(one.tokens),
            _balanced(one.detection),
            _balanced(one.fuzzing),
        )
        for one in found.features
    ]
    table(("feature", "label", "intervention", "tokens", "detection", "fuzzing"), rows)
    say(
        "intervention: how much likelier raising the feature makes its label, in nats; in brackets "
        "what directions of chance do. The others: balanced accuracy, .5 is chance"
    )
    if found.auroc is not None:
        say(f"own labels against those of the other features: AUROC {found.auroc:.2f}")


def score_lines(scores: LabelScores) -> Iterator[str]:
    """What is known of a label, in sentences."""
    one = scores.intervention
    if one is not None:
        chance = (
            ""
            if one.p is None
            else f" (directions of chance: {one.null:+.2f}, {chance_of(one.p, one.q)})"
        )
        yield f"raising it changes log p of {scores.label!r} by {one.gain:+.2f} nats{chance}"
    for what, found in (
        ("its tokens", scores.tokens),
        ("detection", scores.detection),
        ("fuzzing", scores.fuzzing),
    ):
        if found is not None:
            yield (
                f"{what}: precision {found.precision:.2f}, recall {found.recall:.2f} on "
                f"{found.asked} places"
            )


def _gain(one: LabelScores) -> str:
    if one.intervention is None:
        return number(None)
    found = one.intervention
    if found.null_low is None:
        return f"{found.gain:+.2f}"
    return f"{found.gain:+.2f} ({found.null_low:+.2f} to {found.null_high:+.2f})"


def _balanced(found: PredictionScore | None) -> str:
    return number(None if found is None else found.balanced)
