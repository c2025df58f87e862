"""Which slot each token of a forward pass has in each rule.

T tokens of the batch (packed, or a padded batch flattened), P rules of the longest plan in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steer.batch.pooling import PooledTokens
from steer.batch.ramps import Ramps
from steer.batch.requests import NOBODY, Ints, Span


@dataclass(frozen=True)
class GatedTokens:
    """What the gates of a batch look at.

    `until_decision` `[T]` counts the tokens to the one that decides gates held for a whole request,
    the last of its prompt. `read` `[P, T]` are the slots whose gates each token is shown to: its
    own, and on the last prompt token also those of rules that select only later tokens. `onward`
    `[P, T]` are the slots of their requests in rules whose gate is onward, whether a token is
    selected or not; `positions` `[T]` are the tokens' own, `begins` `[T]` that of the first token
    of the same request in the pass. `pooled` are the gates that read several tokens.
    """

    until_decision: Ints
    read: Ints
    onward: Ints
    positions: Ints
    begins: Ints
    pooled: tuple[PooledTokens, ...] = ()

    def carried_on(self, slots: Ints) -> GatedTokens:
        """A pass that takes these requests on by a token each, which have `slots` `[P, T]` and are
        all generated."""
        after_prompt = np.full(slots.shape[1], -1, dtype=np.int64)
        further = self.positions + 1
        return GatedTokens(after_prompt, slots, self.onward, further, further, self.pooled)


@dataclass(frozen=True)
class TokenSlots:
    """`slots` `[P, T]`, gates apart; 0 is no edit. `rows` `[T]` are ledger rows, or `NOBODY`.

    `possible` `[P, T]` are the slots that tokens may have in the passes that carry this one on;
    None where these are their `slots`. `measured` `[T]` marks the tokens of requests that measure
    how large their edits are; None where there are none. `ramps` are those of edits; None where
    there are none.
    """

    slots: Ints
    rows: Ints
    gated: GatedTokens | None = None
    possible: Ints | None = None
    measured: NDArray[np.bool_] | None = None
    ramps: Ramps | None = None

    @staticmethod
    def of(
        spans: Sequence[Span], tokens_in_batch: int, *, reads_tokens: Collection[int] = ()
    ) -> TokenSlots | None:
        """The slots of the tokens of `spans`; None where no request in them is steered.

        Unsteered requests may be left out of `spans`; padding belongs to none. The tokens of spans
        at the offsets `reads_tokens` may have other slots when the pass is carried on.
        """
        steered = [span for span in spans if span.request.rules]
        if not steered:
            return None
        n_rules = max(len(span.request.rules) for span in steered)
        slots = np.zeros((n_rules, tokens_in_batch), dtype=np.int64)
        rows = np.full(tokens_in_batch, NOBODY, dtype=np.int64)
        measured = np.zeros(tokens_in_batch, dtype=bool)
        possible = slots.copy() if reads_tokens else None
        for span in steered:
            mine = span.request.slots(span.positions, span.tokens)
            slots[: len(mine), span.place] = mine
            rows[span.place] = span.request.row
            measured[span.place] = span.request.measure
            if possible is not None:
                may_change = span.offset in reads_tokens
                possible[: len(mine), span.place] = span.request.possible if may_change else mine
        return TokenSlots(
            slots,
            rows,
            _gated(steered, slots),
            possible,
            measured if measured.any() else None,
            Ramps.of(steered, slots.shape),
        )

    @property
    def in_use(self) -> set[int]:
        """Every slot that a token has, may come to have, or decides a gate of."""
        found = set((self.slots if self.possible is None else self.possible).ravel().tolist())
        if self.gated is not None:
            found |= set(self.gated.read.ravel().tolist())
        return found - {0}

    @property
    def shared(self) -> list[int] | None:
        """The slot of each rule where all tokens share it for as long as the pass is carried on,
        whatever gates decide; None where they do not."""
        if self.gated is not None or self.possible is not None or self.slots.shape[1] == 0:
            return None
        if not (self.slots == self.slots[:, :1]).all():
            return None
        return [int(slot) for slot in self.slots[:, 0]]

    def change(self, place: int, slots: Ints) -> None:
        """Gives the token at `place` other slots `[P]`; rules beyond them do not select it."""
        self.slots[:, place] = 0
        self.slots[: len(slots), place] = slots


def _gated(steered: Sequence[Span], slots: Ints) -> GatedTokens | None:
    if not any(span.request.gated for span in steered):
        return None
    until_decision = np.ones(slots.shape[1], dtype=np.int64)
    read = slots.copy()
    onward = np.zeros_like(slots)
    positions = np.zeros(slots.shape[1], dtype=np.int64)
    begins = positions.copy()
    for span in steered:
        until_decision[span.place] = span.request.prompt_length - 1 - span.positions
        positions[span.place] = span.positions
        begins[span.place] = span.positions[:1]
        if span.request.gated:
            watching = span.request.watching(span.positions)
            mine = read[: len(watching), span.place]
            read[: len(watching), span.place] = np.where(watching, watching, mine)
            onward[: len(watching), span.place] = span.request.onward
    pooled = tuple(
        PooledTokens(span.request.row, number, gate, span.request.prompt_length, span.place)
        for span in steered
        for number, gate in span.request.pooling
    )
    return GatedTokens(until_decision, read, onward, positions, begins, pooled)
