"""Feature absorption (2409.14507): a concept is there, and its latent is silent, because a narrower
latent carries it along.

1. A probe of the states (logistic regression) knows where the concept is: direction w, in log-odds.
2. The latents that stand for it: the best one by F1, and others while each adds at least `SPLIT`
   to the F1 of "any of them fires".
3. On held-out positives that the probe recognises, and on which all of these are silent, ablating
   latent j would change the probe's log-odds by z_j ⟨W_dec[j], w⟩. Where the latent that changes
   them most has a cosine of at least `COSINE` with w, and leads the next by at least `LEAD`, the
   concept is absorbed by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from steer.fit.features.monosemanticity import BalancedHalves
from steer.registry.features.trust import Absorber, Absorption

SPLIT = 0.03
MOST_SPLITS = 10
COSINE = 0.025
LEAD = 1.0

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Writes = Callable[[Sequence[int]], Floats]
"""The decoder rows `[K, d]` of features."""


@dataclass(frozen=True)
class Probe:
    """Log-odds of a concept, ⟨`direction`, x⟩ + `bias`, of states x."""

    direction: Floats
    bias: float

    @staticmethod
    def of(states: Floats, positive: Bools) -> Probe:
        """Logistic regression on states `[n, d]`, each channel scaled to its deviation."""
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 (slow import)

        mean, deviation = states.mean(0), states.std(0)
        scale = np.where(deviation > 0, deviation, 1.0)
        fit = LogisticRegression(max_iter=1000).fit((states - mean) / scale, positive)
        direction = fit.coef_[0] / scale
        return Probe(direction, float(fit.intercept_[0] - direction @ mean))

    def log_odds(self, states: Floats) -> Floats:
        found: Floats = states @ self.direction + self.bias
        return found


def absorption(
    states: Floats,
    rows: sparse.csr_array,
    positive: Bools,
    split: BalancedHalves,
    first: int,
    writes: Writes,
) -> Absorption:
    """Where the latents that stand for a concept are silent, from states `[n, d]` and activations
    `rows` `[n, d_sae]` of the same tokens. `first` is the latent that tells it best."""
    probe = Probe.of(states[split.fitted], positive[split.fitted])
    main = standing_for(rows[split.fitted], positive[split.fitted], first)
    right = (probe.log_odds(states[split.held_out]) > 0) == positive[split.held_out]
    held_out = split.held_out[positive[split.held_out] & right]
    fires = (rows[held_out][:, list(main)] > 0).toarray().any(1)
    silent = held_out[~fires]
    absorbers: Counter[int] = Counter()
    cosines: dict[int, float] = {}
    for place in silent:
        found = _absorber(rows[[place]], probe.direction, writes)
        if found is not None:
            absorbers[found[0]] += 1
            cosines[found[0]] = found[1]
    ranked = sorted(absorbers.items(), key=lambda item: (-item[1], item[0]))
    return Absorption(
        features=tuple(main),
        texts=len(held_out),
        probe=float(right.mean()),
        silent=len(silent) / max(len(held_out), 1),
        rate=sum(absorbers.values()) / max(len(held_out), 1),
        absorbers=tuple(
            Absorber(feature=feature, texts=count, cosine=cosines[feature])
            for feature, count in ranked
        ),
    )


def standing_for(rows: sparse.csr_array, positive: Bools, first: int) -> list[int]:
    """The latents that stand for a concept together: `first`, and those that each add `SPLIT` to
    the F1 of "any fires"."""
    active = (rows > 0).tocsc()
    chosen, any_fires = [first], active[:, [first]].toarray()[:, 0]
    score = _f1(any_fires, positive)
    while len(chosen) < MOST_SPLITS:
        # Of each latent, the true and false positives that it would add.
        gained = (active.T @ (positive & ~any_fires).astype(np.int64)).astype(np.float64)
        spoiled = active.T @ (~positive & ~any_fires).astype(np.int64)
        right = int((any_fires & positive).sum()) + gained
        scores = 2 * right / (int(any_fires.sum()) + gained + spoiled + int(positive.sum()))
        scores[chosen] = 0.0
        best = int(scores.argmax())
        if scores[best] < score + SPLIT:
            break
        chosen.append(best)
        any_fires, score = any_fires | active[:, [best]].toarray()[:, 0], float(scores[best])
    return chosen


def _absorber(row: sparse.csr_array, direction: Floats, writes: Writes) -> tuple[int, float] | None:
    """The latent that carries the concept on this token, and its cosine with the probe."""
    features, values = row.indices, row.data.astype(np.float64)
    if not len(features):
        return None
    written = writes([int(one) for one in features])
    effects = values * (written @ direction)
    order = np.argsort(-effects)
    best = int(order[0])
    lead = effects[best] - (effects[order[1]] if len(order) > 1 else 0.0)
    lengths = np.linalg.norm(written[best]) * np.linalg.norm(direction)
    cosine = float(written[best] @ direction / lengths) if lengths > 0 else 0.0
    return (int(features[best]), cosine) if cosine >= COSINE and lead >= LEAD else None


def _f1(predicted: Bools, truth: Bools) -> float:
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 0.0
