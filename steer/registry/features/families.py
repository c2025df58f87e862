"""Families of features: a general one, and those that fire where it does (2408.00657).

1. Of two features, how much of the rarer one's tokens the other shares, above chance:
   (together − n_i n_j / T) / min(n_i, n_j), over the sampled tokens of a survey.
2. Pairs above `LEAST` make a graph; its maximum spanning forest keeps for each feature the ties
   that hold best. A tie goes from the feature that fires oftener to the rarer one.
3. A family is a feature that nothing stands above, with all below it. These heads are taken away
   `ROUNDS` times, which uncovers families within families; of two that share `SAME` of all their
   members (Jaccard) the larger stays.

Dense features stand above everything and mean nothing; they are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import sparse
from scipy.sparse.csgraph import minimum_spanning_tree

from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import UnknownArtefact
from steer.registry.features.survey import ACTIVE_NONE, DENSE, Survey
from steer.registry.registry import Registry
from steer.spec import MAX_FEATURES

LEAST = 0.1
SAME = 0.6
ROUNDS = 3
FEWEST = 5
"""Sampled tokens that a feature has to fire on: fewer say nothing of which others it goes with."""


class FeatureFamily(BaseModel):
    """A feature, `head`, and those that fire where it does; `shared[n]` is the share of the tokens
    of `members[n]`, above chance, on which the one above it in the tree fires too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    head: int
    members: tuple[int, ...]
    shared: tuple[float, ...]

    @property
    def features(self) -> tuple[int, ...]:
        """All of it, the head first."""
        return (self.head, *self.members)


def families(active: NDArray[np.int32], d_sae: int) -> list[FeatureFamily]:
    """The families in a survey's sampled tokens, `active` `[tokens, most active]`; the largest
    first."""
    firing = _firing(active, d_sae)
    counts = np.asarray(firing.sum(0)).ravel().astype(np.int64)
    kept = np.flatnonzero((counts >= FEWEST) & (counts <= DENSE * max(firing.shape[0], 1)))
    ties = _ties(firing[:, kept], counts[kept])
    forest = minimum_spanning_tree(_as_lengths(ties)).tocoo()
    pairs = [
        (int(a), int(b), float(2.0 - length))
        for a, b, length in zip(forest.row, forest.col, forest.data, strict=True)
    ]
    found: list[FeatureFamily] = []
    for _ in range(ROUNDS):
        below = _below(pairs, counts[kept])
        under = {child for children in below.values() for child, _ in children}
        heads = [one for one in below if one not in under]
        found += [_family(head, below, kept) for head in heads]
        pairs = [pair for pair in pairs if not {pair[0], pair[1]} & set(heads)]
    return _distinct(found)


def families_of(found: Iterable[FeatureFamily], feature: int) -> list[FeatureFamily]:
    """The families that a feature is in, those that it heads first, and then the smallest."""
    mine = [one for one in found if feature in one.features]
    return sorted(mine, key=lambda one: (one.head != feature, len(one.members)))


class FamilyCard(BaseModel):
    """The families of a feature, each with the labels of its features and the spec that clamps all
    of it: each feature at least to what it reaches on one in ten of the tokens on which it fires.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: str
    feature: int
    families: tuple[FeatureFamily, ...]
    labels: dict[int, FeatureLabel]
    spec: dict[str, Any] | None


def family_card(registry: Registry, name: str, feature: int) -> FamilyCard:
    """The families of a feature of the SAE `name`, which was surveyed.

    Raises `UnknownArtefact` (`unknown_sae`, `unknown_feature`, `no_survey`).
    """
    sae = registry.sae(name)
    if not 0 <= feature < sae.d_sae:
        raise UnknownArtefact(
            f"the SAE {name!r} has no feature {feature}: it has features 0 to {sae.d_sae - 1}",
            code="unknown_feature",
        )
    survey = registry.surveys.of(registry.entry("sae", name).sha256, name)
    found = families_of(families(survey.array("active_feature"), sae.d_sae), feature)
    known = registry.labels(name)
    named = {n for one in found for n in one.features if n in known}
    return FamilyCard(
        sae=sae.card.name,
        feature=feature,
        families=tuple(found),
        labels={n: known[n] for n in sorted(named)},
        spec=_clamp(name, survey, found[0].features[:MAX_FEATURES]) if found else None,
    )


def _clamp(name: str, survey: Survey, features: Sequence[int]) -> dict[str, Any]:
    reached = [survey.feature(one, context=0).quantiles["0.9"] for one in features]
    item = {
        "kind": "clamp",
        "sae": name,
        "features": list(features),
        "mode": "at_least",
        "value": [float(f"{value:.4g}") for value in reached],
    }
    return {"interventions": [item]}


def _firing(active: NDArray[np.int32], d_sae: int) -> sparse.csr_matrix:
    """`[tokens, d_sae]`, 1 where a feature is among a token's most active."""
    row, column = np.nonzero(active > ACTIVE_NONE)
    ones = np.ones(len(row), np.int32)
    return sparse.csr_matrix((ones, (row, active[row, column])), (len(active), d_sae))


def _ties(firing: sparse.csr_matrix, counts: NDArray[np.int64]) -> sparse.coo_matrix:
    """For each pair, once, what they share above chance, where that is above `LEAST`."""
    together = sparse.triu(firing.T @ firing, k=1).tocoo()
    a, b = together.row, together.col
    chance = counts[a].astype(np.float64) * counts[b] / max(firing.shape[0], 1)
    shared = (together.data - chance) / np.minimum(counts[a], counts[b])
    strong = shared > LEAST
    return sparse.coo_matrix((shared[strong], (a[strong], b[strong])), together.shape)


def _as_lengths(ties: sparse.coo_matrix) -> sparse.csr_matrix:
    """Strong ties as short ones, none of length 0: a minimum tree of these is a maximum tree."""
    return sparse.csr_matrix((2.0 - ties.data, (ties.row, ties.col)), ties.shape)


def _below(
    pairs: Sequence[tuple[int, int, float]], counts: NDArray[np.int64]
) -> dict[int, list[tuple[int, float]]]:
    """For each feature the rarer ones that are tied to it."""
    below: dict[int, list[tuple[int, float]]] = {}
    for a, b, shared in pairs:
        above, child = sorted((a, b), key=lambda one: (-counts[one], one))
        below.setdefault(above, []).append((child, shared))
    return below


def _family(
    head: int, below: dict[int, list[tuple[int, float]]], kept: NDArray[np.intp]
) -> FeatureFamily:
    members: dict[int, float] = {}
    waiting = [head]
    while waiting:
        for child, shared in below.get(waiting.pop(), ()):
            if child not in members:
                members[child] = shared
                waiting.append(child)
    order = sorted(members, key=lambda one: (-members[one], one))
    return FeatureFamily(
        head=int(kept[head]),
        members=tuple(int(kept[one]) for one in order),
        shared=tuple(round(members[one], 6) for one in order),
    )


def _distinct(found: Iterable[FeatureFamily]) -> list[FeatureFamily]:
    """The families of which none shares `SAME` with a larger one."""
    chosen: list[FeatureFamily] = []
    for one in sorted(found, key=lambda one: (-len(one.members), one.head)):
        mine = set(one.features)
        if all(
            len(mine & set(other.features)) < SAME * len(mine | set(other.features))
            for other in chosen
        ):
            chosen.append(one)
    return chosen
