"""A linear probe on states, and what it is held against: a vote of the nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEIGHBOURS = 10
_C = 10.0
"""Scikit-learn's inverse regularisation, for rows of mean length about 1."""


@dataclass(frozen=True, eq=False)
class StateProbe:
    """⟨w, x⟩ + b, the log-odds of the positive class, w `[d]` float32."""

    weights: Float[Tensor, " d"]
    bias: float

    def scores(self, states: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The log-odds of each state, float32."""
        return states.float() @ self.weights + self.bias


def fit_probe(states: Float[Tensor, "n d"], labels: Bool[Tensor, " n"]) -> StateProbe:
    """Logistic regression (scikit-learn's), the classes weighted alike, on channels of unit
    deviation: a few channels of the residual stream are far larger than the others."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 (slow import)

    centre, scale = _scales(states)
    rows = (states.double() - centre) / scale
    model = LogisticRegression(C=_C, class_weight="balanced", max_iter=1000)
    model.fit(rows.numpy(), labels.numpy())
    weights = torch.from_numpy(model.coef_[0]).double() / scale
    return StateProbe(weights.float(), float(model.intercept_[0] - weights @ centre))


def neighbour_scores(
    states: Float[Tensor, "n d"], labels: Bool[Tensor, " n"], asked: Float[Tensor, "m d"]
) -> Float[Tensor, " m"]:
    """For each of `asked` the share of positives among its nearest of `states`, by the cosine of
    the channels as the probe sees them, weighted by it (2407.04485 builds its graph so)."""
    centre, scale = _scales(states)
    known, new = (
        torch.nn.functional.normalize((rows.double() - centre) / scale, dim=-1)
        for rows in (states, asked)
    )
    near = (new @ known.T).topk(min(NEIGHBOURS, len(known)), dim=-1)
    weights = near.values.clamp_min(0.0) + 1e-9
    votes = labels.double()[near.indices]
    share: Tensor = (votes * weights).sum(-1) / weights.sum(-1)
    return share


def shuffled_labels(labels: Bool[Tensor, " n"], seed: int) -> Bool[Tensor, " n"]:
    """The labels in another order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return labels[torch.from_numpy(order)]


def _scales(states: Tensor) -> tuple[Tensor, Tensor]:
    rows = states.double()
    centre, deviation = rows.mean(0), rows.std(0, unbiased=False)
    floor = deviation.max().clamp_min(1e-12) * 1e-6
    return centre, deviation.clamp_min(floor) * rows.shape[1] ** 0.5
