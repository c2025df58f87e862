"""Keeps one sequence's NaN from the others where packed attention is dense.

Dense attention multiplies the values that a token must not see by zero, and 0 · NaN is NaN: one
sequence would end all that share its pass. Flash attention never reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Containment:
    """Stands before a paged cache's `update`.

    Guarantees: the cache holds finite keys and values alone; a sequence of which others came is
    known until it is forgotten, and its logits are NaN, as they would have been.
    """

    def __init__(self, cache: Any) -> None:
        self._update = cache.update
        self._unsound: Tensor | None = None
        self._sequences: set[str] = set()
        cache.update = self._contained

    def begin(self) -> None:
        """A pass begins."""
        self._unsound = None

    def end(self, sequences: Sequence[str], lengths: Sequence[int]) -> None:
        """A pass is over, in which each of `sequences` had so many tokens, in this order."""
        if self._unsound is None:
            return
        parts = torch.split(self._unsound.cpu(), list(lengths))
        self._sequences |= {key for key, part in zip(sequences, parts, strict=True) if part.any()}

    def forget(self, sequence: str) -> None:
        """A sequence has ended."""
        self._sequences.discard(sequence)

    def reset(self) -> None:
        """All sequences have ended."""
        self._sequences.clear()

    def shown(self, logits: Tensor, sequences: Sequence[str]) -> Tensor:
        """`logits` `[n, vocab]` of n sequences, NaN for those whose keys or values were."""
        rows = [row for row, key in enumerate(sequences) if key in self._sequences]
        logits[rows] = math.nan
        return logits

    def _contained(self, key_states: Tensor, value_states: Tensor, *args: Any, **named: Any) -> Any:
        """In the place of the cache's `update`; both states are `[1, heads, T, head_dim]`."""
        sound = key_states.isfinite().all(-1) & value_states.isfinite().all(-1)
        unsound = ~sound.all(1)[0]
        self._unsound = unsound if self._unsound is None else self._unsound | unsound
        hidden = unsound[None, None, :, None]
        keys, values = torch.where(hidden, 0, key_states), torch.where(hidden, 0, value_states)
        return self._update(keys, values, *args, **named)
