"""Vectors of the residual stream read as tokens.

A token's score of a vector v is ⟨v, u⟩, u being the direction that its logit is read along: its row
of the output matrix with the final norm's weight, and with its centring where it centres, at a
state of size 1. Scores of a sum are the sum of the scores, so that a vector's say what it adds to
the logits of a state of size 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.inspection.attribution.head import Size, head_form, read_logits, uncapped_logits

_TINY = 1e-12
_NUMBERS_AT_ONCE = 1 << 24
_DRAWS = 32


@dataclass(frozen=True)
class Vocabulary:
    """Assumes: the engine's model answers `unembed`.

    `size` is what the final norm divides by, `cap` the soft cap of the logits, `constant` `[vocab]`
    what a state of zeros says: the head's biases.
    """

    engine: Engine
    size: Size
    cap: float | None
    constant: Float[Tensor, " vocab"]

    @staticmethod
    def of(engine: Engine) -> Vocabulary:
        """Raises `Unsupported` (`unsupported_inspection`) for a head that is not linear behind a
        norm."""
        width = engine.info.d_model
        size, cap = head_form(engine, _drawn(1, width)[0])
        nothing = read_logits(engine, torch.zeros(1, width).double())
        return Vocabulary(engine, size, cap, uncapped_logits(nothing, cap)[0])

    def scores(self, vectors: Float[Tensor, "N d_model"]) -> Float[Tensor, "N vocab"]:
        """float64; a vector that the norm does not see, such as one of zeros, scores 0."""
        given = vectors.double().cpu()
        sizes = self.size(given)
        seen = sizes > _TINY
        units = torch.where(seen, given / sizes.clamp_min(_TINY), 0.0)
        read = uncapped_logits(read_logits(self.engine, units), self.cap) - self.constant
        return torch.where(seen, read * sizes, 0.0)

    def pieces(
        self, vectors: Float[Tensor, "N d_model"]
    ) -> Iterator[tuple[slice, Float[Tensor, "n vocab"]]]:
        """`scores` of some vectors at a time, so that memory does not grow with their number."""
        rows = max(1, _NUMBERS_AT_ONCE // self.engine.info.vocab_size)
        for start in range(0, len(vectors), rows):
            part = slice(start, min(start + rows, len(vectors)))
            yield part, self.scores(vectors[part])

    @cached_property
    def by_chance(self) -> float:
        """How far above or below all others, in deviations, the best of all tokens stands along the
        best of some random directions."""
        return max(
            float(standings(scores).abs().max())
            for _, scores in self.pieces(_drawn(_DRAWS, self.engine.info.d_model))
        )


def standings(scores: Float[Tensor, "N vocab"]) -> Float[Tensor, "N vocab"]:
    """By how many deviations each score lies above the mean of its row."""
    spread = scores.std(-1, unbiased=False, keepdim=True).clamp_min(1e-30)
    found: Tensor = (scores - scores.mean(-1, keepdim=True)) / spread
    return found


def _drawn(count: int, width: int) -> Float[Tensor, "count width"]:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).double()
