"""What `steer sae` says to a person."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steer.cli.reporting import table_out
from steer.cli.sae.effect import effect_lines
from steer.cli.sae.score import score_lines
from steer.cli.sae.tables import number, say, table
from steer.cli.sae.trust import trust_lines

if TYPE_CHECKING:
    from rich.text import Text

    from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch
    from steer.fit.features.contrast import Contrast
    from steer.inspection.activations import ActivationsResult
    from steer.registry.features.card import FeatureCard
    from steer.registry.features.families import FamilyCard
    from steer.registry.features.survey import FeatureExample, FeatureStatistics


def show_card(card: FeatureCard) -> None:
    """A feature: what is known of it in lines, its examples in a table."""
    say(f"feature {card.feature} of {card.sae}, layer {card.layer}, {card.site}")
    say(f"label: {said(card.label)}{_source(card.label)}")
    for one in card.labels[1:]:
        say(f"also called: {said(one)}{_source(one)}")
    say(
        "nearest decoder rows: "
        + ", ".join(f"{one.feature} ({one.cosine:.2f})" for one in card.neighbours)
    )
    for line in _measured(card):
        say(line)
    found = card.statistics
    if found is None:
        say(f"not surveyed: `steer sae survey {card.sae} TEXTS` counts what its features do")
        return
    for line in _counted(found):
        say(line)
    if card.together:
        say(
            "fires together with: "
            + ", ".join(f"{one.feature} ({one.jaccard:.2f})" for one in card.together[:5])
        )
    if found.top:
        _show_examples("greatest activations", found.top)
    if found.fired > len(found.top):
        _show_examples("drawn evenly", sorted(found.sample, key=lambda one: -one.value))


def _measured(card: FeatureCard) -> Iterable[str]:
    if card.effect is not None:
        yield from effect_lines(card.effect)
    if card.scores is not None:
        yield from score_lines(card.scores)
    if card.trust is not None:
        yield from trust_lines(card.trust)


def _counted(found: FeatureStatistics) -> Iterable[str]:
    on = f"{found.tokens} tokens of {found.texts} texts"
    if found.dead:
        yield f"DEAD: it never fired on {on}"
        return
    middle = found.quantiles["0.5"]
    yield (
        f"fires on {found.rate:.3%} of {on}: mean {found.mean:.3g}, median {middle:.3g}, "
        f"largest {found.largest:.3g}"
    )
    if found.dense:
        yield "DENSE: a feature that fires so often seldom stands for one thing"


def _show_examples(title: str, examples: Sequence[FeatureExample]) -> None:
    from rich.table import Table

    drawn = Table(title=title)
    drawn.add_column("value", justify="right")
    drawn.add_column("token in its text", overflow="fold")
    for one in examples:
        drawn.add_row(f"{one.value:.3g}", marked(one))
    table_out().print(drawn)


def marked(example: FeatureExample) -> Text:
    """The tokens around an example, its own in bold."""
    from rich.text import Text

    text = Text()
    for place, token in enumerate(example.tokens):
        text.append(repr(token)[1:-1], style="bold green" if place == example.at else "")
    return text


def show_matches(found: Sequence[FeatureMatch], *, by_meaning: bool = False) -> None:
    """One row a feature, the best match first; by meaning with its cosine."""
    table(
        ("feature", "label", "effect", *(["cosine"] if by_meaning else [])),
        [
            (
                str(one.feature),
                said(one.label),
                number(one.label.effect),
                *([number(one.score)] if by_meaning else []),
            )
            for one in found
        ],
    )
    if not found:
        say("no label has these words")


def show_family(found: FamilyCard) -> None:
    """One row a feature: the head of each family, and those below it."""
    for family in found.families:
        rows = [(f"{family.head} (head)", number(None))]
        rows += [
            (str(n), f"{one:.2f}") for n, one in zip(family.members, family.shared, strict=True)
        ]
        named = [
            (name, shared, said(found.labels.get(feature)))
            for (name, shared), feature in zip(rows, family.features, strict=True)
        ]
        table(("feature", "shared", "label"), named)
    if found.spec is None:
        say("it is in no family: nothing fires where it does oftener than by chance")
        return
    say(json.dumps(found.spec))


def show_active(result: ActivationsResult) -> None:
    """One row a token, its most active features first."""
    reading = result.features
    assert reading is not None
    rows = []
    for position, active, top in zip(result.positions, reading.active, reading.top, strict=True):
        features = "\n".join(
            f"{one.feature} = {one.activation:.2f}  {said(one.label)}" for one in top
        )
        token = repr(result.tokens[position])[1:-1]
        rows.append((str(position), token, str(active), features))
    table(("position", "token", "active", "most active"), rows)


def show_survey(name: str, counts: Mapping[str, Any]) -> None:
    """What a survey has counted (`Survey.counts`)."""
    say(
        "{tokens} tokens of {texts} texts: {active_per_token:.1f} features fire on a token, "
        "{never_active} of {d_sae} on none".format(**counts)
    )
    say(f"`steer sae show {name} FEATURE` shows one")


def show_contrast(found: Contrast) -> None:
    """One row a feature, the one that tells the sets apart best first."""
    rows = [
        (
            str(one.feature),
            one.fires_on,
            f"{one.auroc:.3f}",
            f"{one.p:.2g}",
            f"{one.held_out:.3f} [{one.low:.2f}, {one.high:.2f}]",
            "yes" if one.confirmed else "no",
            said(one.label),
        )
        for one in found.features
    ]
    table(("feature", "fires on", "AUROC", "p", "held out", "confirmed", "label"), rows)
    say(
        f"{found.tested} features fire on the half that finds; the best of them reaches "
        f"{found.chance:.3f} by chance in 1 of 20. {found.positive} and {found.negative} texts"
    )
    if not any(one.confirmed for one in found.features):
        say("none is confirmed: give more texts, or sets that differ in more")


def _source(label: FeatureLabel | None) -> str:
    return "" if label is None or label.source is None else f" ({label.source})"


def said(label: FeatureLabel | None) -> str:
    """A label in words."""
    return "none" if label is None or not label.text else label.text
