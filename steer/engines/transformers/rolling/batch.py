"""The running batch: sequences that join, take one step together, and leave.

Prompts are computed apart and their cache rows adopted; from then on every decode step is one
forward pass over all rows. Rows are kept in the order of the cache's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steer.batch.requests import Span
from steer.batch.step import CarriedStep, Step, build_step
from steer.batch.tables import Tables
from steer.engines.listeners import Item
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.prompts import Read, run_prompts
from steer.engines.transformers.proof import prove_steering
from steer.engines.transformers.rolling.cache import RollingCache
from steer.engines.transformers.room import CacheRoom
from steer.engines.transformers.sequences import (
    BatchSequence,
    RequestRows,
    failure_of,
    is_last,
    take_tokens,
)
from steer.readouts.readings import Readings, ReadSpan


class RollingBatch(RequestRows):
    """Assumes: one thread.

    Guarantees: a sequence's tokens do not depend on its neighbours; slots and ledger rows are
    given back when it leaves, for whatever reason.
    """

    def __init__(
        self,
        hooked: HookedModel,
        tables: Tables,
        *,
        rows: int,
        eos: frozenset[int],
        prefill_tokens: int = 4096,
        chunk: int = 512,
        room: CacheRoom = CacheRoom(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(hooked, tables, rows=rows, eos=eos, room=room)
        self._prefill_tokens = prefill_tokens
        self.causal = True  # or prompts could not be computed in parts
        self.chunk: int | None = chunk
        self.max_length = min(hooked.info.max_length, room.widest)
        self._cache = RollingCache(hooked.device, room)
        self._carried: CarriedStep | None = None

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether rows that may come to `lengths` have room beside those that run."""
        return self.room.padded([*(s.longest for s in self.sequences), *lengths])

    def join(self, newcomers: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        """Computes the prompts, samples their first tokens and adds the sequences to the batch.

        Prompts of like length are computed together, at most `prefill_tokens` at a time.
        """
        items: list[tuple[BatchSequence, Item]] = []
        for group in self._groups(newcomers):
            items += self._join(group)
        self._changed()
        return items

    def _join(self, group: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        """One group in one pass; where that fails, each of its prompts in a pass of its own."""
        try:
            done = run_prompts(
                self.hooked,
                self.tables,
                self.ledger,
                [s.steered for s in group],
                [s.request.prompt for s in group],
                chunk=self.chunk,
                read=Read.of([s.reads for s in group], self.instruments),
            )
        except Exception as error:
            return self._join_apart(group, error)
        if done.logits is None or done.cache is None:
            raise AssertionError("the last chunk computes logits and leaves a cache")
        self._cache.adopt(done.cache, done.mask)
        self.sequences.extend(group)
        return self._take(group, done.logits[:, -1])

    def _join_apart(
        self, group: Sequence[BatchSequence], error: Exception
    ) -> list[tuple[BatchSequence, Item]]:
        """The batch has no part in a prompt's pass, so that it goes on without who made it fail."""
        leaders = [sequence for sequence in group if sequence.leads]
        if len(leaders) == 1:
            for one in group:
                self.give_back(one.steered)
            return [(leaders[0], failure_of(error))]
        items: list[tuple[BatchSequence, Item]] = []
        for sequence in leaders:
            for one in sequence.together:
                self.ledger.recount(one.steered.row)
            items += self._join(sequence.together)
        return items

    def decode(self) -> list[tuple[BatchSequence, Item]]:
        """One token for every sequence."""
        logits = self._forward()
        self._cache.advance()
        return self._take(self.sequences, logits)

    def leave(self, sequence: BatchSequence) -> None:
        """Takes a sequence, and its twin, out of the batch."""
        for one in sequence.together:
            row = next(n for n, s in enumerate(self.sequences) if s is one)
            self._cache.remove(row)
            last = self.sequences.pop()
            if last is not one:
                self.sequences[row] = last
            self.give_back(one.steered)
        self._changed()

    def clear(self) -> list[BatchSequence]:
        """Takes every sequence out, after a failure; returns them."""
        left, self.sequences = self.sequences, []
        # The failed pass may have left the cache half-written.
        self._cache = RollingCache(self.hooked.device, self.room)
        for sequence in left:
            self.give_back(sequence.steered)
        self._carried = None
        return left

    def prove(self) -> None:
        """The start-up proof; raises `Unsupported`."""
        prove_steering(self.hooked)

    def _forward(self) -> Tensor:
        device = self.hooked.device
        ids = torch.tensor([[s.tokens[-1]] for s in self.sequences], device=device)
        places = torch.tensor([[s.fed] for s in self.sequences], device=device)
        step, readings = self._step(), self._readings()
        outputs, _ = self.hooked.forward(
            step,
            readings=readings,
            input_ids=ids,
            attention_mask=self._cache.mask(1),
            position_ids=places,
            key_values=self._cache.cache,
            use_cache=True,
        )
        logits: Tensor = outputs.logits[:, -1].float()
        if readings is not None:
            readings.finish()
        return logits

    def _readings(self) -> Readings | None:
        """What this decode reads."""
        return self.readings(
            [
                ReadSpan(s.reads, row, s.fed, 1)
                for row, s in enumerate(self.sequences)
                if s.reads is not None
            ]
        )

    def _step(self) -> Step | None:
        """The step of this decode; the same object as long as nobody's slots can change."""
        if self._carried is not None and self._carried.carry_on():
            return self._carried.step
        spans = [
            Span(
                s.steered,
                row,
                np.array([s.fed], dtype=np.int64),
                np.array([s.tokens[-1]], dtype=np.int64),
            )
            for row, s in enumerate(self.sequences)
            if s.steered.plan is not None
        ]
        step = build_step(self.tables, self.ledger, spans, len(self.sequences))
        passes = min((s.fixed_for for s in self.sequences), default=0) - 1
        self._carried = CarriedStep(step, passes)
        return step

    def _changed(self) -> None:
        self._carried = None
        self._cache.trim()

    def _take(
        self, sequences: Sequence[BatchSequence], logits: Tensor
    ) -> list[tuple[BatchSequence, Item]]:
        """Samples from each row; ended sequences leave the batch."""
        items = take_tokens(list(sequences), logits, self.ledger, self.eos)
        for sequence, item in items:
            if is_last(item):
                self.leave(sequence)
        return items

    def _groups(self, newcomers: Sequence[BatchSequence]) -> list[list[BatchSequence]]:
        groups: list[list[BatchSequence]] = []
        longest = 0
        leaders = [sequence for sequence in newcomers if sequence.leads]
        for sequence in sorted(leaders, key=lambda s: len(s.request.prompt)):
            length, more = len(sequence.request.prompt), sequence.together
            roomy = groups and (len(groups[-1]) + len(more)) * length <= self._prefill_tokens
            if roomy and length <= 2 * longest + 16:
                groups[-1] += more
            else:
                groups.append(more)
                longest = length
        return groups
