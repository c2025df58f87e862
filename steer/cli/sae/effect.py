"""`steer sae effect`: does a feature cause what it detects?"""

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
from steer.cli.sae.tables import chance_of, number, say, table
from steer.fit.requests.features.effect import EffectRequest

if TYPE_CHECKING:
    from steer.registry.features.effect import OutputEffect, TargetEffect

PROMPTS = keyword(
    "prompts",
    Annotated[
        Path | None,
        typer.Option(help="Questions to ask, JSON lines; by default shipped neutral ones."),
    ],
    None,
)
FEATURES = keyword(
    "features", Annotated[list[int], typer.Argument(min=0, help="The features' numbers.")]
)


def _parameters() -> Iterator[Parameter]:
    sae, *fields = options(EffectRequest, leave_out=("features",))
    yield sae
    yield FEATURES
    yield PROMPTS
    yield MODEL
    yield from fields
    yield AS_JSON
    yield from PLACE


def asked_in(file: Path | None) -> dict[str, Any]:
    """The field of the questions in a file, where one was named. Raises `SteerError`."""
    from steer.fit.data.pairs import read_prompts
    from steer.fit.data.prompt import prompt_json

    return {} if file is None else {"prompts": [prompt_json(one) for one in read_prompts(file)]}


def _effect(values: dict[str, Any]) -> None:
    fields = {**read_values(EffectRequest, values), **asked_in(values.pop("prompts"))}
    request = checked(EffectRequest, fields)
    with working(**values) as (engine, library):
        request.check(engine, library)
        with progress_bar("directions", request.work()) as done:
            found = request.run(engine, library, progress=done)
    if values["as_json"]:
        typer.echo(json.dumps([one.model_dump() for one in found], indent=2))
        return
    show_effects(found)


EFFECT = command(
    _effect,
    tuple(_parameters()),
    summary="Measure whether features cause what the model says, beside directions of chance.",
)


def show_effects(found: list[OutputEffect]) -> None:
    """One row a feature, and what the words of the verdicts mean."""
    from steer.registry.features.effect import VERDICTS

    rows = [
        (
            str(one.feature),
            one.verdict,
            f"{one.strength:.3g}",
            f"{one.kl:.2g}",
            _beside(one.written),
            _beside(one.detected),
            " ".join(repr(token.token)[1:-1] for token in one.promoted[:8]),
        )
        for one in found
    ]
    table(("feature", "verdict", "raised by", "KL", "written", "detected", "promoted"), rows)
    for verdict in dict.fromkeys(one.verdict for one in found):
        say(VERDICTS[verdict])
    say(
        "written, detected: the change in nats of the tokens that the decoder row points to, and "
        f"of those it fires on; in brackets the strongest of {found[0].nulls} nulls at that KL, "
        f"and q, the false discovery rate over {len(found)} features"
    )


def effect_lines(effect: OutputEffect) -> Iterator[str]:
    """What is known of a feature's effect, in sentences."""
    from steer.registry.features.effect import VERDICTS

    yield VERDICTS[effect.verdict]
    yield (
        f"raised by {effect.strength:.3g}, at a KL of {effect.kl:.2g} nats, it promotes "
        + ", ".join(f"{one.token!r} ({one.change:+.1f})" for one in effect.promoted[:8])
    )
    for what, target in (
        ("the tokens it points to", effect.written),
        ("the tokens it fires on", effect.detected),
    ):
        if target is not None:
            yield (
                f"{what} change by {target.change:+.2f} nats; of {effect.nulls} nulls at that KL "
                f"the strongest changes them by {target.strongest:+.2f} "
                f"({chance_of(target.p, target.q)})"
            )


def _beside(target: TargetEffect | None) -> str:
    if target is None:
        return number(None)
    chance = "" if target.q is None else f", q {target.q:.2g}"
    return f"{target.change:+.2f} ({target.strongest:+.2f}{chance})"
