"""Thresholds chosen on the scores of harmless texts, above which a detector may rarely fire.

A text's score is the greatest of its tokens', and the detector fires on scores that are strictly
greater than the threshold, so that texts with equal scores fare alike. Scores are logits:
probabilities near 1 are equal in floating point where logits still differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from steer.artefacts.detection import Threshold
from steer.errors import SteerError


def chosen_threshold(rule: Threshold, scores: Sequence[float], rate: float) -> float:
    """The threshold that `rule` gives for the `scores` of harmless texts.

    Raises `SteerError` (`too_few_safe_texts`) where these are too few for the rule.
    """
    if rule == "conformal":
        return conformal_threshold(scores, rate)
    return quantile_threshold(scores, rate)


def conformal_threshold(scores: Sequence[float], rate: float) -> float:
    """The k-th smallest of n scores, k = ⌈(n + 1)(1 − rate)⌉.

    Of a further text like these the chance to be above it is at most `rate`, whatever the scores
    are distributed like and however many are equal. Raises `SteerError` where k > n: then no score
    among them is high enough, and how many texts are needed is said.
    """
    exact, n = _share(rate), len(scores)
    k = math.ceil((n + 1) * (1 - exact))
    if k > n:
        least = math.ceil((1 - exact) / exact)
        raise SteerError(
            f"a false rate of at most {rate:g} cannot be promised from {n} safe texts: it takes at "
            f"least {least} that the probe was not fitted to; give more texts, a higher 'rate', or "
            "'threshold': 'false_positive_rate', which promises nothing",
            code="too_few_safe_texts",
        )
    return sorted(scores)[k - 1]


def quantile_threshold(scores: Sequence[float], rate: float) -> float:
    """The smallest of the scores that no more than the share `rate` of them is above. It promises
    nothing of other texts. Raises `SteerError` without a score."""
    if not scores:
        raise SteerError(
            "a threshold is chosen on safe texts, and none is left for it: give more",
            code="too_few_safe_texts",
        )
    allowed = math.floor(len(scores) * _share(rate))
    return sorted(scores)[max(len(scores) - allowed - 1, 0)]


def _share(rate: float) -> Fraction:
    """`rate` as it is written: 0.05 is a twentieth here, which no float is."""
    if not 0 < rate < 1:
        raise SteerError(f"a rate is a share between 0 and 1; got {rate!r}", code="invalid_option")
    return Fraction(str(rate))
