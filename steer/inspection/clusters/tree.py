"""Agglomerative clusters: every state begins as a cluster, and the two nearest are joined until one
is left; cutting the tree gives any number of clusters.

States share a mean, and their lengths differ by token more than by what they say; so the mean is
taken away and each is made a unit vector, and distances are those of directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Linkage: TypeAlias = Literal["ward", "average", "complete"]

_SHUFFLES = 100


@dataclass(frozen=True)
class Cut:
    """`numbers` `[n]` says which cluster, from 0, each state belongs to; the largest comes first.

    `silhouette` is the mean, over states, of how much nearer a state lies to its own cluster than
    to the next (-1 to 1); None where each state is a cluster, or all are one.
    """

    numbers: tuple[int, ...]
    silhouette: float | None

    @property
    def count(self) -> int:
        return max(self.numbers) + 1


def directions(states: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """Unit vectors of `states` from their mean, float64; a state at the mean is zeros."""
    x = states.double().cpu()
    x = x - x.mean(0)
    lengths = x.norm(dim=-1, keepdim=True)
    # Where all states are the same, what is left of them is rounding.
    seen = lengths > 1e-9 * states.double().cpu().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return torch.where(seen, x / lengths.clamp_min(1e-30), 0.0)


def cut_tree(
    units: Float[Tensor, "n width"], linkage: Linkage, count: int | None, most: int
) -> Cut:
    """`count` clusters of `units`; with None that number from 2 to `most` whose silhouette is
    greatest. Fewer come out where fewer differ.

    Assumes: at least two rows.
    """
    from scipy.cluster.hierarchy import fcluster  # noqa: PLC0415 (slow import)
    from scipy.cluster.hierarchy import linkage as joined  # noqa: PLC0415
    from scipy.spatial.distance import pdist, squareform  # noqa: PLC0415

    near = pdist(units.numpy())
    tree, full = joined(near, method=linkage), squareform(near)
    counts = [count] if count is not None else range(2, max(min(most, len(units) - 1), 2) + 1)
    cuts = [_cut(fcluster(tree, k, criterion="maxclust"), full) for k in counts]
    return max(cuts, key=lambda one: -2.0 if one.silhouette is None else one.silhouette)


def _cut(found: np.ndarray, distances: np.ndarray) -> Cut:
    """The clusters of `found`, numbered from the largest; of equals the first to come is first."""
    from sklearn.metrics import silhouette_score  # noqa: PLC0415 (slow import)

    names = found.tolist()
    order = sorted(dict.fromkeys(names), key=lambda one: -names.count(one))
    numbers = tuple(order.index(one) for one in names)
    whole = 1 < len(order) < len(names)
    score = float(silhouette_score(distances, numbers, metric="precomputed")) if whole else None
    return Cut(numbers, score)


def purity(numbers: tuple[int, ...], labels: tuple[str | None, ...]) -> float | None:
    """The share of labelled states that bear the commonest label of their cluster; None where no
    state has a label."""
    counts: dict[int, dict[str, int]] = {}
    for number, label in zip(numbers, labels, strict=True):
        if label is not None:
            here = counts.setdefault(number, {})
            here[label] = here.get(label, 0) + 1
    total = sum(sum(here.values()) for here in counts.values())
    return sum(max(here.values()) for here in counts.values()) / total if total else None


def purity_by_chance(
    numbers: tuple[int, ...], labels: tuple[str | None, ...], seed: int = 0
) -> float | None:
    """The mean purity of the same clusters where the labels are shuffled over the states that have
    one: small clusters are pure by chance."""
    places = [n for n, label in enumerate(labels) if label is not None]
    if not places:
        return None
    drawn = np.random.default_rng(seed)
    own = tuple(numbers[n] for n in places)
    given = [labels[n] for n in places]
    found = [
        purity(own, tuple(given[n] for n in drawn.permutation(len(given))))
        for _ in range(_SHUFFLES)
    ]
    return sum(one or 0.0 for one in found) / len(found)
