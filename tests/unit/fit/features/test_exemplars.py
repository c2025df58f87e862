"""Labels made of examples alone."""

from __future__ import annotations

from steer.fit.features.exemplars import Commonness, exemplar_label
from steer.registry.features.survey import FeatureExample, FeatureStatistics


def statistics(*texts: tuple[str, ...], at: int = 1) -> FeatureStatistics:
    top = tuple(
        FeatureExample(value=9.0 - n, text=n, position=at, at=at, tokens=tokens)
        for n, tokens in enumerate(texts)
    )
    return FeatureStatistics(
        model="m",
        texts=10,
        tokens=100,
        fired=len(top),
        rate=len(top) / 100,
        mean=1.0,
        largest=9.0,
        dead=False,
        dense=False,
        quantiles={},
        edges=(),
        histogram=(),
        top=top,
        sample=top[:2],
    )


COMMON = Commonness({" the": 0.9, " in": 0.1, " city": 0.1})


def test_one_token_is_named_alone() -> None:
    label = exemplar_label(statistics(("x", " Rome"), ("y", " Rome"), ("z", " Oslo")), COMMON)
    assert label.text == "the token ' Rome'"
    assert label.tokens == (" Rome",)
    assert (label.density, label.largest) == (0.03, 9.0)


def test_several_tokens_are_named_by_how_often_and_then_by_letter() -> None:
    label = exemplar_label(
        statistics(("x", " b"), ("y", " a"), ("z", " c"), ("w", " a"), ("v", " d"), ("u", " e")),
        COMMON,
    )
    assert label.text == "tokens such as ' a', ' b', ' c', ' d'"


def test_what_stands_around_is_named_where_it_is_not_common() -> None:
    rows = [((" in", f" {name}", " city")) for name in "abcd"]
    assert exemplar_label(statistics(*rows), COMMON).text == (
        "tokens such as ' a', ' b', ' c', ' d', after ' in', before ' city'"
    )
    common = [((" the", f" {name}", " city")) for name in "abcd"]
    assert exemplar_label(statistics(*common), COMMON).text == (
        "tokens such as ' a', ' b', ' c', ' d', before ' city'"
    )
    assert "after" not in exemplar_label(statistics(*rows[:3]), COMMON).text  # too few to tell
