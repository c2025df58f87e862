"""FMS: does one latent carry a concept, and that latent alone? (2506.19382)

    FMS@p = accs₀ · (local@p + global) / 2
    local@p = 2 (accs₀ − accs_p)                the fall when the p best latents are taken away
    global  = 1 − Σᵢ (accs_cumᵢ − accs₀) / n     how little i more levels of the tree add

accs are accuracies of decision trees (Gini, scikit-learn's) on pooled activations: accs₀ of the
root, accs_p of the root that is found once p roots are taken away, accs_cumᵢ of a tree i levels
deeper. They are of held-out texts, with as many of either class, so that chance is ½.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

LEVELS = 5
"""Levels below the root that are looked at (n)."""
LEAST = 8
"""Texts that each class needs."""


@dataclass(frozen=True)
class BalancedHalves:
    """Rows to fit on and rows to hold out, each with as many of either class."""

    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @staticmethod
    def of(positive: NDArray[np.bool_], seed: int) -> BalancedHalves:
        """A half of each class, drawn with `seed`; of the larger class, as many as of the other."""
        rng = np.random.default_rng(seed)
        sides = [rng.permutation(np.flatnonzero(positive == one)) for one in (True, False)]
        count = min(map(len, sides))
        cut = count // 2
        return BalancedHalves(
            np.sort(np.concatenate([side[:cut] for side in sides])),
            np.sort(np.concatenate([side[cut:count] for side in sides])),
        )


@dataclass(frozen=True)
class Monosemanticity:
    """The score of one concept and its parts; `features` are the roots in the order in which they
    were taken away, the concept's own first."""

    fms: float
    capacity: float
    local: float
    widely: float
    features: tuple[int, ...]


def monosemanticity(
    rows: sparse.csr_array,
    positive: NDArray[np.bool_],
    split: BalancedHalves,
    *,
    p: int = 1,
    seed: int = 0,
) -> Monosemanticity | None:
    """The FMS@p of the concept that `positive` rows `[texts, d_sae]` have; None where no feature
    fires on the rows that are fitted."""
    fitted, held_out = rows[split.fitted], rows[split.held_out]
    alive = np.flatnonzero(np.diff(fitted.tocsc().indptr))
    if not len(alive):
        return None
    fitted, held_out = fitted[:, alive], held_out[:, alive]
    truth = positive[split.fitted], positive[split.held_out]
    columns = list(range(len(alive)))
    roots: list[int] = []
    accuracies: list[float] = []
    while len(accuracies) <= p:
        if not columns:
            accuracies.append(0.5)
            continue
        accuracy, root = _root(fitted[:, columns], held_out[:, columns], truth, seed)
        accuracies.append(accuracy)
        if root is None:
            columns = []
        else:
            roots.append(int(alive[columns[root]]))
            del columns[root]
    if not roots:
        return None
    capacity, without = accuracies[0], accuracies[p]
    deeper = [_tree(fitted, held_out, truth, 1 + n, seed) for n in range(1, LEVELS + 1)]
    local = 2 * (capacity - without)
    widely = 1 - sum(one - capacity for one in deeper) / LEVELS
    return Monosemanticity(
        fms=capacity * (local + widely) / 2,
        capacity=capacity,
        local=local,
        widely=widely,
        features=tuple(roots),
    )


def _root(
    fitted: sparse.csr_array,
    held_out: sparse.csr_array,
    truth: Sequence[NDArray[np.bool_]],
    seed: int,
) -> tuple[float, int | None]:
    """The held-out accuracy of the best single column, and which that is (None: no column tells
    anything)."""
    tree = _grown(fitted, truth[0], 1, seed)
    root = int(tree.tree_.feature[0])
    return float(tree.score(_csr(held_out), truth[1])), root if root >= 0 else None


def _tree(
    fitted: sparse.csr_array,
    held_out: sparse.csr_array,
    truth: Sequence[NDArray[np.bool_]],
    depth: int,
    seed: int,
) -> float:
    return float(_grown(fitted, truth[0], depth, seed).score(_csr(held_out), truth[1]))


def _grown(rows: sparse.csr_array, truth: NDArray[np.bool_], depth: int, seed: int):  # type: ignore[no-untyped-def]
    from sklearn.tree import DecisionTreeClassifier  # noqa: PLC0415 (slow import)

    tree = DecisionTreeClassifier(criterion="gini", max_depth=depth, random_state=seed)
    return tree.fit(_csr(rows), truth)


def _csr(rows: sparse.csr_array) -> sparse.csr_matrix:
    """As scikit-learn takes it: its own index type, and a matrix."""
    found = sparse.csr_matrix(rows, dtype=np.float32)
    found.indices, found.indptr = found.indices.astype(np.int32), found.indptr.astype(np.int32)
    return found
