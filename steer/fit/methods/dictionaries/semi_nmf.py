"""Semi-nonnegative factorisation (Ding et al. 2010; of MLP activations, SNMF, 2506.10920).

    A ≈ Z Gᵀ,   A [d, n] of any sign, Z [d, k] of any sign, G [n, k] ≥ 0

alternating the least-squares Z = A G (GᵀG + εI)⁻¹ with the multiplicative update

    G ← G ⊙ √((P⁺ + G Q⁻) / (P⁻ + G Q⁺)),   P = AᵀZ,  Q = ZᵀZ,

where M⁺ and M⁻ are a matrix's positive part and the size of its negative part. The update of plain
NMF, G ⊙ P / (GQ), divides by and multiplies with negative numbers here, and diverges.

A is given as rows `[n, d]`, one activation each. Float64. Memory: 2·n·d + 4·n·k + 2·d·k floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from steer.errors import SteerError

_EPSILON = 1e-6
_STARTS = 10


@dataclass(frozen=True)
class Factors:
    """`components` `[k, d]` of unit length; `weights` `[n, k]` ≥ 0, how much each row has of each;
    `explained` is 1 − ‖A − Z Gᵀ‖² / ‖A‖²."""

    components: Tensor
    weights: Tensor
    explained: float


def semi_nmf(
    rows: Tensor,
    count: int,
    *,
    keep: float | None = None,
    penalty: float = 0.0,
    iterations: int = 100,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Factors:
    """Factors of `rows` `[n, d]` into `count` components.

    `keep` leaves only that share of each component's entries, the largest (SNMF: .01), and scales
    it back to its length; `penalty` is an L1 price on the weights, relative to the mean squared
    row (CoX-LMM, 2406.08074). Starts from k-means clusters drawn with `seed`; `progress` is told of
    every iteration. Raises `SteerError` for more components than rows.
    """
    n, d = rows.shape
    if not 1 <= count <= n:
        raise SteerError(
            f"{count} components cannot be found in {n} activations: give more data, or ask for "
            "fewer",
            code="invalid_option",
        )
    if (keep is not None and not 0 < keep <= 1) or penalty < 0 or iterations < 1:
        raise SteerError(
            "keep is a share in (0, 1], penalty at least 0 and iterations at least 1",
            code="invalid_option",
        )
    data = rows.double()
    price = penalty * float(data.pow(2).sum(1).mean())
    weights = _clusters(data, count, seed)
    components = torch.zeros(count, d, dtype=torch.float64)
    for _ in range(iterations):
        components = fitted_components(data, weights)
        if keep is not None:
            components = sparse(components, keep)
        components, weights = unit_components(components, weights)
        weights = updated_weights(data, components, weights, price)
        if progress is not None:
            progress(1)
    missed = (data - weights @ components).pow(2).sum()
    return Factors(components, weights, 1 - float(missed / data.pow(2).sum()))


def fitted_components(rows: Tensor, weights: Tensor) -> Tensor:
    """The least-squares components `[k, d]`: Zᵀ = (GᵀG + εI)⁻¹ GᵀA."""
    gram = weights.T @ weights
    gram.diagonal().add_(_EPSILON)
    found: Tensor = torch.linalg.solve(gram, weights.T @ rows)
    return found


def sparse(components: Tensor, keep: float) -> Tensor:
    """The largest share `keep` of every component's entries by size, at least one; the component's
    length stays what it was."""
    kept = max(1, round(keep * components.shape[1]))
    places = components.abs().topk(kept, dim=1).indices
    thin = torch.zeros_like(components).scatter(1, places, components.gather(1, places))
    tiny = torch.finfo(components.dtype).tiny
    factor = components.norm(dim=1, keepdim=True) / thin.norm(dim=1, keepdim=True).clamp_min(tiny)
    rescaled: Tensor = thin * factor
    return rescaled


def unit_components(components: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Components of unit length, and weights that give the same product."""
    lengths = components.norm(dim=1)
    safe = lengths.clamp_min(torch.finfo(components.dtype).tiny)
    return components / safe[:, None], weights * lengths


def updated_weights(
    rows: Tensor, components: Tensor, weights: Tensor, price: float = 0.0
) -> Tensor:
    """One multiplicative step of the weights; `price` is the derivative of the L1 penalty."""
    p, q = rows @ components.T, components @ components.T
    tiny = torch.finfo(rows.dtype).tiny
    above = p.clamp_min(0) + weights @ (-q).clamp_min(0)
    below = (-p).clamp_min(0) + weights @ q.clamp_min(0) + price / 2
    stepped: Tensor = weights * (above / below.clamp_min(tiny)).sqrt()
    return stepped


def _clusters(rows: Tensor, count: int, seed: int) -> Tensor:
    """Weights to start from: a row's cluster has 1.2, every other component .2.

    Clusters of directions, not of rows: how much a row has of a component says nothing of which.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415 (slow import)

    unit = functional.normalize(rows, dim=1).numpy()
    found = KMeans(n_clusters=count, n_init=_STARTS, random_state=seed).fit(unit)
    labels = torch.from_numpy(found.labels_).long()
    return functional.one_hot(labels, count).double() + 0.2
