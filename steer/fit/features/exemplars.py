"""Labels of features from their best examples alone: which tokens, and among which others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steer.artefacts.sae.labels import FeatureLabel
from steer.registry.features.survey import FeatureExample, FeatureStatistics, Survey

TOKENS = 4
"""Tokens that a label names."""
MOST = 0.6
"""A token or a context is named by itself where it is so in this share of the examples."""
LEAST_EXAMPLES = 4
LEAST_LIFT = 4.0
"""A token is context where it stands so much oftener around the examples than in any text."""
SPAN = 5
"""Tokens on either side of an example that count as around it."""


@dataclass(frozen=True)
class Commonness:
    """In which share of a survey's texts each token occurs."""

    share: Mapping[str, float]

    @staticmethod
    def of(survey: Survey) -> Commonness:
        counts: Counter[int] = Counter()
        for number in range(survey.card.texts):
            counts.update(set(survey.text(number)))
        vocabulary = survey.card.vocabulary
        shares: Counter[str] = Counter()
        for token, count in counts.items():
            shares[vocabulary[token]] += count
        return Commonness({text: count / survey.card.texts for text, count in shares.items()})


def exemplar_labels(
    survey: Survey, features: Iterable[int] | None = None
) -> dict[int, FeatureLabel]:
    """A label for each of `features` (None: all) that fired in the survey, from what it fired on.

    Nothing is asked of any model, and the same survey gives the same labels.
    """
    common = Commonness.of(survey)
    found = {}
    for feature in range(survey.card.d_sae) if features is None else features:
        statistics = survey.feature(feature, context=SPAN)
        if not statistics.dead:
            found[feature] = exemplar_label(statistics, common)
    return found


def exemplar_label(found: FeatureStatistics, common: Commonness) -> FeatureLabel:
    """The label of one feature that fired."""
    examples = distinct_examples(found)
    tokens = _by_count(one.tokens[one.at] for one in examples)
    first, count = tokens[0]
    named = [token for token, _ in tokens[:TOKENS]]
    if count >= MOST * len(examples):
        text, named = f"the token {first!r}", [first]
    else:
        text = "tokens such as " + ", ".join(map(repr, named))
    for word, side in (("after", _before), ("before", _behind)):
        context = _context(examples, side, common)
        text += f", {word} {context!r}" if context is not None else ""
    return FeatureLabel(
        text=text, tokens=tuple(named), density=found.rate, largest=max(found.largest, 0.0)
    )


def distinct_examples(found: FeatureStatistics) -> list[FeatureExample]:
    """The greatest examples and those drawn evenly, each token once."""
    kept: dict[tuple[int, int], FeatureExample] = {}
    for one in (*found.top, *found.sample):
        kept.setdefault((one.text, one.position), one)
    return list(kept.values())


def _before(one: FeatureExample) -> Sequence[str]:
    return one.tokens[: one.at]


def _behind(one: FeatureExample) -> Sequence[str]:
    return one.tokens[one.at + 1 :]


def _context(examples: Sequence[FeatureExample], side: object, common: Commonness) -> str | None:
    """The token that stands on this side of most examples and of few others."""
    assert callable(side)
    if len(examples) < LEAST_EXAMPLES:
        return None
    for token, count in _by_count(token for one in examples for token in set(side(one))):
        share = count / len(examples)
        if share < MOST:
            return None
        if token.strip() and share >= LEAST_LIFT * common.share.get(token, 0.0):
            return token
    return None


def _by_count(tokens: Iterable[str]) -> list[tuple[str, int]]:
    """The tokens, those that occur most often first; of equals in the alphabet's order."""
    return sorted(Counter(tokens).items(), key=lambda item: (-item[1], item[0]))
