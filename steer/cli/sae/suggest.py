"""`steer sae suggest`: which features do what a sentence asks for?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import Parameter
from typing import TYPE_CHECKING, Any

import typer

from steer.cli.measure.asking import AS_JSON
from steer.cli.options import MODEL, PLACE, checked, command, options, read_values
from steer.cli.reporting import progress_bar
from steer.cli.sae.effect import PROMPTS, asked_in
from steer.cli.sae.place import working
from steer.cli.sae.tables import number, say, table
from steer.fit.requests.features.suggest import SuggestRequest

if TYPE_CHECKING:
    from steer.fit.features.suggestion import Suggestions


def _parameters() -> Iterator[Parameter]:
    sae, instruction, *fields = options(SuggestRequest)
    yield instruction
    yield sae
    yield PROMPTS
    yield MODEL
    yield from fields
    yield AS_JSON
    yield from PLACE


def _suggest(values: dict[str, Any]) -> None:
    fields = {**read_values(SuggestRequest, values), **asked_in(values.pop("prompts"))}
    request = checked(SuggestRequest, fields)
    with working(**values) as (engine, library):
        request.check(engine, library)
        with progress_bar("answers", request.work(engine)) as done:
            found = request.run(engine, library, progress=done)
    if values["as_json"]:
        typer.echo(found.model_dump_json(indent=2, exclude_none=True))
        return
    show_suggestions(found)


SUGGEST = command(
    _suggest,
    tuple(_parameters()),
    summary="Find the features that do what a sentence asks for, with the spec that clamps them.",
)


def show_suggestions(found: Suggestions) -> None:
    """One row a feature, the one that does most first, and its spec."""
    from steer.cli.sae.showing import said

    rows = [
        (
            str(one.feature),
            f"{one.held_out:.2f}",
            f"{one.gain:+.2f} ({number(one.null)})",
            number(one.p),
            number(one.q),
            "yes" if one.causes else "no",
            said(one.label),
        )
        for one in found.features
    ]
    table(("feature", "tells (AUROC)", "does (chance)", "p", "q", "causes", "label"), rows)
    say(
        f"does: how much likelier, in nats a token, its answers are to the model that is told; "
        f"the words themselves do {found.told:+.2f}. q: the false discovery rate of p over "
        f"{len(found.features)} features"
    )
    best = found.features[0]
    if not best.causes:
        say("none does more than chance: what tells the answers apart does not make them")
    say(f"with feature {best.feature}: {best.example!r}")
    say(json.dumps(best.spec))
