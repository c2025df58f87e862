"""How well scores tell two classes apart: the area under the ROC curve, and the curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from steer.artefacts.calibration import MeasuredInterval
from steer.fit.measure.bootstrap import LEVEL

Floats = NDArray[np.float64]

_ROC_POINTS = 101


def auroc(positive: Floats, negative: Floats) -> Floats:
    """Mann and Whitney's share of pairs in which the positive has the higher score, a tie counting
    half; of scores `[..., P]` and `[..., N]`."""
    ranks = rankdata(np.concatenate([positive, negative], axis=-1), axis=-1)
    ones, rest = positive.shape[-1], negative.shape[-1]
    won = ranks[..., :ones].sum(-1) - ones * (ones + 1) / 2
    share: Floats = won / (ones * rest)
    return share


def auroc_interval(
    positive: Sequence[float], negative: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> MeasuredInterval:
    """The AUROC and its 95 % percentile bootstrap interval, drawn within each class."""
    rng = np.random.default_rng(seed)
    ones, rest = (np.asarray(side, dtype=np.float64) for side in (positive, negative))
    drawn = auroc(
        ones[rng.integers(0, len(ones), (resamples, len(ones)))],
        rest[rng.integers(0, len(rest), (resamples, len(rest)))],
    )
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return MeasuredInterval(value=float(auroc(ones, rest)), low=float(low), high=float(high))


def roc_points(
    positive: Sequence[float], negative: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    """(false, true) positive rate above each score, from (0, 0) to (1, 1); of many, a hundred."""
    ones, rest = np.sort(np.asarray(positive)), np.sort(np.asarray(negative))
    cuts = np.unique(np.concatenate([ones, rest]))[::-1]
    points = [
        (
            1 - float(np.searchsorted(rest, cut, side="right")) / len(rest),
            1 - float(np.searchsorted(ones, cut, side="right")) / len(ones),
        )
        for cut in cuts
    ]
    points.append((1.0, 1.0))
    if len(points) > _ROC_POINTS:
        kept = np.linspace(0, len(points) - 1, _ROC_POINTS).round().astype(int)
        points = [points[place] for place in kept]
    return tuple(points)


def share_above(scores: Sequence[float], threshold: float) -> float:
    """The share of `scores` that are strictly greater."""
    return sum(score > threshold for score in scores) / len(scores)
