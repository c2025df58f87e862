"""Scores of all pairs of tokens as a product of two thin matrices, A Bᵀ.

A and B are vocabulary × a head's width; of the product some rows are held at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 23


class TokenPair(NamedTuple):
    """An input and an output token, and what the one gives to the other."""

    input: int
    output: int
    score: float


@dataclass(frozen=True)
class Spread:
    """`mean` and `deviation` over all pairs; `own` is the mean over tokens with themselves."""

    mean: float
    deviation: float
    own: float

    @property
    def copying(self) -> float:
        """How far above other pairs a token stands with itself, in deviations."""
        return (self.own - self.mean) / max(self.deviation, 1e-30)


def spread_of(reads: Float[Tensor, "vocab rank"], writes: Float[Tensor, "vocab rank"]) -> Spread:
    """Over all pairs, without computing one: of A Bᵀ the squares sum to ⟨AᵀA, BᵀB⟩."""
    a, b = reads.double(), writes.double()
    mean = float(a.mean(0) @ b.mean(0))
    square = float(((a.T @ a) * (b.T @ b)).sum()) / (len(a) * len(b))
    own = float((a * b).sum(-1).mean())
    return Spread(mean, max(square - mean**2, 0.0) ** 0.5, own)


def strongest_pairs(
    reads: Float[Tensor, "inputs rank"], writes: Float[Tensor, "outputs rank"], count: int
) -> tuple[tuple[TokenPair, ...], tuple[TokenPair, ...]]:
    """The `count` pairs with the greatest scores and those with the least, strongest first.

    Exact: inputs come in the order of their length, until no longer one could give a stronger pair.
    """
    lengths = reads.norm(dim=-1)
    order = lengths.argsort(descending=True, stable=True)
    longest = float(writes.norm(dim=-1).max())
    best: dict[int, list[TokenPair]] = {1: [], -1: []}
    for inputs in order.split(max(1, _NUMBERS_AT_ONCE // len(writes))):
        bound = float(lengths[inputs[0]]) * longest
        full = all(len(pairs) == count for pairs in best.values())
        if full and all(bound < sign * pairs[-1].score for sign, pairs in best.items()):
            break
        scores = reads[inputs] @ writes.T
        for sign, pairs in best.items():
            found = _largest(scores * sign, inputs, count)
            pairs += [TokenPair(i, o, score * sign) for i, o, score in found]
            pairs.sort(key=lambda pair: (-sign * pair.score, pair.input, pair.output))
            del pairs[count:]
    return tuple(best[1]), tuple(best[-1])


def _largest(
    scores: Float[Tensor, "n outputs"], inputs: Tensor, count: int
) -> list[tuple[int, int, float]]:
    """The largest of `scores`: they lie in the rows with the largest maxima."""
    rows = scores.amax(-1).topk(min(count, len(scores))).indices
    among = scores[rows]
    best = among.flatten().topk(min(count, among.numel()))
    width = scores.shape[-1]
    return [
        (int(inputs[rows[place // width]]), place % width, value)
        for place, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
