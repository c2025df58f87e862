"""Which features tell two sets of texts apart, and which of them would by chance.

A feature is as good as its AUROC: how often its activation on a text of the first set is above that
on one of the second, ties counting half. With tens of thousands of features some tell any two sets
apart, so half of the texts find and the other half confirms:

- On the first half, the labels are shuffled many times; `p` is the share of shuffles in which the
  best of *all* features is as far from ½ (Westfall and Young's max statistic: the chance of even
  one false discovery, exact under ties and correlated features).
- On the second half, AUROC with its 95 % interval (Newcombe 2006, method 5, which does not collapse
  at 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import sparse
from scipy.stats import rankdata

from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import SteerError

LEAST = 8
"""Texts a set needs: with fewer, half of them say nothing."""
LEVEL = 0.05
_Z = 1.959963984540054
_BLOCK = 1 << 12

Array = NDArray[Any]


class ContrastFeature(BaseModel):
    """A feature that tells the sets apart.

    `fires_on` is the set with the larger activations. `auroc` and `p` (of the best of all features
    by chance) are from the half that found it, `held_out` with its 95 % interval from `low` to
    `high` from the other half. `confirmed`: `p` is at most 0.05 and the interval keeps to its side
    of ½. The means are those of its pooled activation over all texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: int
    label: FeatureLabel | None
    fires_on: str
    auroc: float
    p: float
    held_out: float
    low: float
    high: float
    confirmed: bool
    mean_positive: float
    mean_negative: float


class Contrast(BaseModel):
    """Features by how far their AUROC is from ½, the furthest first.

    `tested` are those that fire on any text of the finding half, `chance` the AUROC (of either
    side) that the best of them reaches by chance in 1 of 20.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: int
    negative: int
    tested: int
    chance: float
    features: tuple[ContrastFeature, ...]


@dataclass(frozen=True)
class _Half:
    """The pooled activations of half of the texts, and which of them are of the first set."""

    rows: sparse.csc_array
    first: Array


def contrast(
    positive: sparse.csr_array,
    negative: sparse.csr_array,
    *,
    labels: Mapping[int, FeatureLabel] | None = None,
    top: int = 10,
    permutations: int = 999,
    seed: int = 0,
) -> Contrast:
    """Ranks features by pooled activations `[texts, d_sae]` of two sets. Raises `SteerError`
    (`too_few_texts`)."""
    for name, rows in (("positive", positive), ("negative", negative)):
        if rows.shape[0] < LEAST:
            raise SteerError(
                f"{name!r} has {rows.shape[0]} texts: half of them find features and half "
                f"confirm them, which takes at least {LEAST}",
                code="too_few_texts",
                param=f"/{name}",
            )
    rng = np.random.default_rng(seed)
    finding, confirming = _halves(positive, negative, rng)
    tested = np.flatnonzero(np.diff(finding.rows.indptr))
    shuffles = np.stack([rng.permutation(finding.first) for _ in range(permutations)])
    found = np.full(positive.shape[1], 0.5)
    strongest = np.zeros(permutations)
    for start in range(0, len(tested), _BLOCK):
        block = tested[start : start + _BLOCK]
        ranks = _ranks(finding.rows[:, block])
        found[block] = _aurocs(ranks, finding.first[None])[0]
        by_chance = _aurocs(ranks, shuffles)
        np.maximum(strongest, np.abs(by_chance - 0.5).max(1), out=strongest)
    order = np.lexsort((np.arange(len(found)), -np.abs(found - 0.5)))
    best = [int(one) for one in order[:top] if found[one] != 0.5]
    held_out = np.full(len(best), 0.5)
    if best:
        held_out = _aurocs(_ranks(confirming.rows[:, best]), confirming.first[None])[0]
    sides = (int(confirming.first.sum()), int((~confirming.first).sum()))
    features = []
    for feature, other in zip(best, held_out.tolist(), strict=True):
        auroc = float(found[feature])
        p = (1 + int((strongest >= abs(auroc - 0.5) - 1e-12).sum())) / (1 + permutations)
        low, high = auroc_interval(other, *sides)
        features.append(
            ContrastFeature(
                feature=feature,
                label=(labels or {}).get(feature),
                fires_on="positive" if auroc > 0.5 else "negative",
                auroc=auroc,
                p=p,
                held_out=other,
                low=low,
                high=high,
                confirmed=p <= LEVEL and (low > 0.5 if auroc > 0.5 else high < 0.5),
                mean_positive=float(positive[:, [feature]].mean()),
                mean_negative=float(negative[:, [feature]].mean()),
            )
        )
    return Contrast(
        positive=positive.shape[0],
        negative=negative.shape[0],
        tested=len(tested),
        chance=0.5 + float(np.quantile(strongest, 1 - LEVEL)),
        features=tuple(features),
    )


def auroc_interval(auroc: float, positive: int, negative: int) -> tuple[float, float]:
    """The 95 % interval of an AUROC from so many texts of each set: all θ from which it is no more
    than 1.96 standard errors away, these being Hanley and McNeil's at θ (Newcombe 2006)."""
    mean = (positive + negative) / 2

    def fits(theta: float) -> bool:
        spread = 1 + (mean - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * spread / (positive * negative)
        return abs(auroc - theta) <= _Z * math.sqrt(variance)

    return _end(fits, auroc, 0.0), _end(fits, auroc, 1.0)


def _end(fits: Any, inside: float, outside: float) -> float:
    """The last value from `inside` towards `outside` that fits, by bisection."""
    if inside == outside:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside


def _halves(
    positive: sparse.csr_array, negative: sparse.csr_array, rng: np.random.Generator
) -> tuple[_Half, _Half]:
    """Each set cut in two at random; a text too many finds."""
    orders = [rng.permutation(rows.shape[0]) for rows in (positive, negative)]
    cuts = [(len(order) + 1) // 2 for order in orders]

    def half(*chosen: Array) -> _Half:
        kept = [rows[np.sort(one)] for rows, one in zip((positive, negative), chosen, strict=True)]
        rows = sparse.vstack(kept, format="csc")
        return _Half(rows, np.arange(rows.shape[0]) < len(chosen[0]))

    return (
        half(*(order[:cut] for order, cut in zip(orders, cuts, strict=True))),
        half(*(order[cut:] for order, cut in zip(orders, cuts, strict=True))),
    )


def _ranks(columns: sparse.csc_array) -> Array:
    """The rank of each text for each feature, ties sharing theirs."""
    found: Array = rankdata(columns.toarray(), axis=0)
    return found


def _aurocs(ranks: Array, first: Array) -> Array:
    """`[labellings, features]`: of each labelling the AUROC of each feature (Mann and Whitney)."""
    ones = first.sum(1, keepdims=True)
    rest = first.shape[1] - ones
    found: Array = (first.astype(np.float64) @ ranks - ones * (ones + 1) / 2) / (ones * rest)
    return found
