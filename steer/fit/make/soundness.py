"""Is an answer still a text? What breaks repeats itself, or says what no text says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_REPETITION = 0.5
"""The share of a text's runs of three tokens that have stood in it before."""

_MARGIN = math.log(1.5)
_QUANTILE = 0.95


@dataclass(frozen=True)
class Soundness:
    """An answer is sound if it has at least three tokens or ends by itself, repeats at most
    `MAX_REPETITION` of itself, and its mean −log p under the unsteered model, in nats, is at most
    `max_loss`."""

    max_loss: float

    @staticmethod
    def of(losses: Sequence[float]) -> Soundness:
        """The bound from the losses of answers that the unsteered model gave, with and without the
        instruction: half as perplexing again as the least likely twentieth of them."""
        ordered = sorted(losses)
        return Soundness(ordered[min(len(ordered) - 1, int(_QUANTILE * len(ordered)))] + _MARGIN)

    def holds(self, tokens: Sequence[int], loss: float) -> bool:
        """Whether an answer of these tokens, with this mean loss, is sound."""
        return bool(tokens) and repetition(tokens) <= MAX_REPETITION and loss <= self.max_loss


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of three tokens that have stood in the text before; 0 for shorter texts."""
    runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
