"""The running batch of a model whose sequences cannot share a pass.

Recurrent and convolution states take in padding tokens like any others, and a cache of a model's
own class may not be cut or joined. So each sequence has a cache of its own, made by the model as
`generate` makes it, its prompt is computed whole, and a step is one pass per sequence. Exact for
whatever generates alone; the time of a step grows with the number of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steer.batch.requests import Span
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.engines.listeners import Item
from steer.engines.transformers.alone.caches import OwnCaches
from steer.engines.transformers.alone.memory import Memory, Places, attributes
from steer.engines.transformers.cache import given_cache
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.prompts import last_columns
from steer.engines.transformers.proof import prove_steering
from steer.engines.transformers.room import CacheRoom
from steer.engines.transformers.sequences import (
    BatchSequence,
    RequestRows,
    failure_of,
    is_last,
    take_tokens,
)
from steer.readouts.readings import Readings, ReadSpan


class AloneBatch(RequestRows):
    """A `Batch` in which every sequence is computed alone.

    Assumes: one thread.
    Guarantees: as `Batch`.
    """

    chunk: int | None = None

    def __init__(
        self,
        hooked: HookedModel,
        tables: Tables,
        caches: OwnCaches,
        *,
        rows: int,
        eos: frozenset[int],
        room: CacheRoom = CacheRoom(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(hooked, tables, rows=rows, eos=eos, room=room)
        self.max_length = min(hooked.info.max_length, room.tokens)
        self._memories: dict[int, Memory] = {}
        self._caches, self.causal = caches, caches.causal
        self._places = self._find_places()

    @torch.inference_mode()
    def _find_places(self) -> Places:
        """Where the model keeps what it needs, from a pass and one token after it."""
        before = dict(attributes(self.hooked.model))
        self._places, memory = Places(self.hooked.model, before), Memory(self._caches.new())
        self._forward(memory, [1, 2, 3], 0, None)
        self._forward(memory, [4], 3, None)
        return Places(self.hooked.model, before)

    def join(self, newcomers: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        """Computes the prompts, one after the other, and samples their first tokens."""
        for sequence in newcomers:
            self._memories[id(sequence)] = self._places.fresh(self._caches.new())
            self.sequences.append(sequence)
        return self._advance(newcomers)

    def decode(self) -> list[tuple[BatchSequence, Item]]:
        """One token for every sequence."""
        return self._advance(list(self.sequences))

    def leave(self, sequence: BatchSequence) -> None:
        """Takes a sequence, and its twin, out of the batch."""
        for one in sequence.together:
            self.sequences = [s for s in self.sequences if s is not one]
            del self._memories[id(one)]
            self.give_back(one.steered)

    def clear(self) -> list[BatchSequence]:
        """Takes every sequence out, after a failure; returns them."""
        left = list(self.sequences)
        for sequence in left:
            if sequence.leads:
                self.leave(sequence)
        return left

    def prove(self) -> None:
        """The start-up proof; raises `Unsupported`."""
        prove_steering(self.hooked)

    def _advance(self, sequences: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        """A pass and a token for each; who makes its pass fail ends alone."""
        items: list[tuple[BatchSequence, Item]] = []
        computed: list[BatchSequence] = []
        rows: list[Tensor] = []
        for sequence in (s for s in sequences if s.leads):
            try:
                found = [self._logits(one) for one in sequence.together]
            except Exception as error:
                items.append((sequence, failure_of(error)))
            else:
                rows += found
                computed += sequence.together
        if computed:
            items += take_tokens(computed, torch.cat(rows), self.ledger, self.eos)
        for sequence, item in items:
            if is_last(item):
                self.leave(sequence)
        return items

    def _logits(self, sequence: BatchSequence) -> Tensor:
        """One pass over a sequence's next tokens."""
        start = sequence.fed if sequence.tokens else 0
        tokens = sequence.tokens[-1:] or sequence.request.prompt
        step = self._step(sequence, tokens, start)
        readings = self._readings(sequence, tokens, start)
        logits = self._forward(self._memories[id(sequence)], tokens, start, step, readings)
        if readings is not None:
            readings.finish()  # what the model keeps has been stored
        return logits

    def _step(self, sequence: BatchSequence, tokens: Sequence[int], start: int) -> Step | None:
        if sequence.steered.plan is None:
            return None
        places = np.arange(start, start + len(tokens), dtype=np.int64)
        span = Span(sequence.steered, 0, places, np.asarray(tokens, dtype=np.int64))
        return build_step(self.tables, self.ledger, [span], len(tokens))

    def _readings(
        self, sequence: BatchSequence, tokens: Sequence[int], start: int
    ) -> Readings | None:
        if sequence.reads is None:
            return None
        return self.readings([ReadSpan(sequence.reads, 0, start, len(tokens))])

    def _forward(
        self,
        memory: Memory,
        tokens: Sequence[int],
        start: int,
        step: Step | None,
        readings: Readings | None = None,
    ) -> Tensor:
        """The pass of one sequence's next tokens; float32 logits `[1, vocab]` of the last."""
        device, end = self.hooked.device, start + len(tokens)
        self._places.load(memory)
        outputs, _ = self.hooked.forward(
            step,
            readings=readings,
            input_ids=torch.tensor([list(tokens)], device=device),
            position_ids=torch.arange(start, end, device=device)[None],
            key_values=memory.cache,
            use_cache=True,
            logits_to_keep=last_columns(1, len(tokens), device),
        )
        self._places.store(memory)
        returned = given_cache(outputs)
        memory.cache = memory.cache if returned is None else returned
        logits: Tensor = outputs.logits[:, -1].float()
        return logits
