"""`steer sae trust`: how purely do features stand for known concepts?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.measure.asking import AS_JSON
from steer.cli.options import MODEL, PLACE, checked, command, keyword, options, read_values
from steer.cli.reporting import progress_bar
from steer.cli.sae.place import working
from steer.cli.sae.tables import number, say, table
from steer.fit.requests.features.trust import TrustRequest

if TYPE_CHECKING:
    from steer.registry.features.trust import ConceptTrust


def _parameters() -> Iterator[Parameter]:
    sae, *fields = options(TrustRequest, leave_out=("texts", "data"))
    yield sae
    yield keyword(
        "data",
        Annotated[
            Path,
            typer.Option(
                "--data", "-d", help='JSON lines: {"text": …, "label": …}, or with messages.'
            ),
        ],
    )
    yield MODEL
    yield from fields
    yield AS_JSON
    yield from PLACE


def _trust(values: dict[str, Any]) -> None:
    from steer.fit.data.labels import read_labelled
    from steer.fit.data.prompt import prompt_json

    data = read_labelled(values.pop("data"))
    texts = [{"prompt": prompt_json(one.prompt), "label": one.label} for one in data.items]
    request = checked(TrustRequest, {**read_values(TrustRequest, values), "texts": texts})
    with working(**values) as (engine, library):
        request.check(engine, library)
        with progress_bar("texts", request.work(library)) as done:
            found = request.run(engine, library, progress=done)
    if values["as_json"]:
        typer.echo(json.dumps([one.model_dump() for one in found], indent=2))
        return
    show_trust(found)


TRUST = command(
    _trust,
    tuple(_parameters()),
    summary="Measure how purely features stand for the labels of texts (FMS, absorption).",
)


def show_trust(found: list[ConceptTrust]) -> None:
    """One row a concept, the purest first."""
    rows = [
        (
            one.concept,
            str(one.feature) if one.present else f"{one.feature} (by its silence)",
            f"{one.fms:.2f}",
            f"{one.capacity:.2f}",
            f"{one.local:.2f}",
            f"{one.widely:.2f}",
            number(None if one.absorption is None else one.absorption.rate),
        )
        for one in found
    ]
    headings = ("concept", "feature", "FMS", "alone", "only", "no others", "absorbed")
    table(headings, rows)
    if not found:
        say("no feature fires on these texts")
        return
    say(
        "FMS = alone · (only + no others) / 2: how well the feature tells the concept, how much is "
        "lost without it, and how little others add; .97 is one pure feature, .27 noise"
    )


def trust_lines(trust: ConceptTrust) -> Iterator[str]:
    """What is known of a feature's concept, in sentences."""
    side = "" if trust.present else " by its silence"
    yield (
        f"tells {trust.concept!r} from other texts{side}: FMS@{trust.p} {trust.fms:.2f} (alone "
        f"{trust.capacity:.2f}, only {trust.local:.2f}, no others {trust.widely:.2f})"
    )
    found = trust.absorption
    if found is not None and found.absorbers:
        named = ", ".join(f"{one.feature} ({one.texts})" for one in found.absorbers[:5])
        yield (
            f"ABSORBED on {found.rate:.0%} of {found.texts} texts of {trust.concept!r}: it is "
            f"silent, and in its place fires {named}. Clamp these too: with_absorbers"
        )
