"""What `steer sae` says to a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steer.cli.reporting import out, table_out

if TYPE_CHECKING:
    from rich.text import Text

    from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch
    from steer.fit.features.contrast import Contrast
    from steer.inspection.activations import ActivationsResult
    from steer.registry.features.card import FeatureCard
    from steer.registry.features.survey import FeatureExample, FeatureStatistics


def show_card(card: FeatureCard) -> None:
    """A feature: what is known of it in lines, its examples in a table."""
    _say(f"feature {card.feature} of {card.sae}, layer {card.layer}, {card.site}")
    _say(f"label: {said(card.label)}")
    _say(
        "nearest decoder rows: "
        + ", ".join(f"{one.feature} ({one.cosine:.2f})" for one in card.neighbours)
    )
    found = card.statistics
    if found is None:
        _say(f"not surveyed: `steer sae survey {card.sae} TEXTS` counts what its features do")
        return
    for line in _counted(found):
        _say(line)
    if card.together:
        _say(
            "fires together with: "
            + ", ".join(f"{one.feature} ({one.jaccard:.2f})" for one in card.together[:5])
        )
    if found.top:
        _show_examples("greatest activations", found.top)
    if found.fired > len(found.top):
        _show_examples("drawn evenly", sorted(found.sample, key=lambda one: -one.value))


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

    table = Table(title=title)
    table.add_column("value", justify="right")
    table.add_column("token in its text", overflow="fold")
    for one in examples:
        table.add_row(f"{one.value:.3g}", marked(one))
    table_out().print(table)


def marked(example: FeatureExample) -> Text:
    """The tokens around an example, its own in bold."""
    from rich.text import Text

    text = Text()
    for place, token in enumerate(example.tokens):
        text.append(repr(token)[1:-1], style="bold green" if place == example.at else "")
    return text


def show_matches(found: Sequence[FeatureMatch]) -> None:
    """One row a feature, the best match first."""
    _table(
        ("feature", "label", "effect"),
        [(str(one.feature), said(one.label), _number(one.label.effect)) for one in found],
    )
    if not found:
        _say("no label has these words")


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
    _table(("position", "token", "active", "most active"), rows)


def show_survey(name: str, counts: Mapping[str, Any]) -> None:
    """What a survey has counted (`Survey.counts`)."""
    _say(
        "{tokens} tokens of {texts} texts: {active_per_token:.1f} features fire on a token, "
        "{never_active} of {d_sae} on none".format(**counts)
    )
    _say(f"`steer sae show {name} FEATURE` shows one")


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
    _table(("feature", "fires on", "AUROC", "p", "held out", "confirmed", "label"), rows)
    _say(
        f"{found.tested} features fire on the half that finds; the best of them reaches "
        f"{found.chance:.3f} by chance in 1 of 20. {found.positive} and {found.negative} texts"
    )
    if not any(one.confirmed for one in found.features):
        _say("none is confirmed: give more texts, or sets that differ in more")


def said(label: FeatureLabel | None) -> str:
    """A label in words."""
    return "none" if label is None or not label.text else label.text


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    table_out().print(table)


def _say(line: str) -> None:
    out().print(line, highlight=False, markup=False)
