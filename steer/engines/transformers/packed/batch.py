"""The running batch on a GPU: sequences packed end to end, over transformers' paged cache.

The scheduler is the same as for a rolling batch. A sequence that the cache cannot hold any longer
is put back by transformers and computed anew later, its generated tokens included; a token's phase
follows from its position and the original prompt, so that this changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import CarriedStep, Step, build_step
from steer.batch.tables import Tables
from steer.engines.base import CaptureRequest, GenerationRequest, TokenReadout
from steer.engines.listeners import Item
from steer.engines.readouts import joined
from steer.engines.transformers.capture import capture_batch
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.packed.model import Chunk, PackedModel, PackedOptions
from steer.engines.transformers.packed.proof import prove_packed
from steer.engines.transformers.proof import prove_steering
from steer.engines.transformers.sequences import (
    BatchSequence,
    RequestRows,
    failure_of,
    is_last,
    take_tokens,
)
from steer.errors import EngineError, SteerError
from steer.readouts.readings import Readings, ReadSpan
from steer.readouts.twins import KeptStates, chosen_at, divergences


@dataclass
class _Packed:
    """A sequence and how much of it the cache holds."""

    sequence: BatchSequence
    key: str
    computed: int = 0
    kept: KeptStates | None = None
    """The states that its tokens are chosen from, where they are compared with its twin's."""

    def ids(self, start: int, length: int) -> list[int]:
        """The token ids at `[start, start + length)`."""
        prompt, tokens = self.sequence.request.prompt, self.sequence.tokens
        first = start - len(prompt)
        if first >= 0:
            return tokens[first : first + length]
        return [*prompt[start : start + length], *tokens[: max(first + length, 0)]]


class PackedBatch(RequestRows):
    """A `Batch` in which T tokens of any number of sequences make one pass `[1, T]`.

    Assumes: one thread.
    Guarantees: as `Batch`; no state is shared between requests; a receipt counts every token once,
    however often it was computed.
    """

    pairs = False

    def __init__(
        self,
        hooked: HookedModel,
        tables: Tables,
        *,
        rows: int,
        eos: frozenset[int],
        options: PackedOptions = PackedOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(hooked, tables, rows=rows, eos=eos)
        self.causal = True  # or prompts could not be computed in parts
        self.chunk: int | None = 512  # of captures, which are padded
        self.packed_model = PackedModel(hooked, rows=rows, options=options)
        self.max_length = min(hooked.info.max_length, self.packed_model.capacity)
        self._packed: dict[str, _Packed] = {}
        self._keys: dict[int, str] = {}
        self._joined = 0
        self._carried: tuple[tuple[str, ...], CarriedStep] | None = None

    def take(self, request: GenerationRequest) -> SteeredRequest:
        self._carried = None  # the tables may change
        return super().take(request)

    def give_back(self, steered: SteeredRequest) -> None:
        self._carried = None
        super().give_back(steered)

    def join(self, newcomers: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        """Queues sequences; their first tokens come from `decode`."""
        for sequence in newcomers:
            self._joined += 1
            key = str(self._joined)
            self.sequences.append(sequence)
            packed = self._packed[key] = _Packed(sequence, key)
            self._keys[id(sequence)] = key
            asked = sequence.request.readouts
            if asked is not None and asked.kl:
                packed.kept = KeptStates(self.hooked.info, len(sequence.request.prompt))
            self.packed_model.add(key, sequence.request.prompt)
        return []

    def decode(self) -> list[tuple[BatchSequence, Item]]:
        """One pass: a token for every sequence whose prompt is computed, and parts of prompts."""
        chunks = self.packed_model.next()
        readings = self._readings(chunks)
        logits = self.packed_model.forward(chunks, self._step(chunks), readings)
        if readings is not None:
            readings.finish()
        for chunk in chunks:
            self._packed[chunk.key].computed = chunk.start + chunk.length
        final = [self._packed[chunk.key].sequence for chunk in chunks if chunk.final]
        items = take_tokens(final, logits, self.ledger, self.eos)
        # Of a sequence that ends in an error, any token: it is never computed.
        self.packed_model.accept(
            [0 if isinstance(item, SteerError) else item.token for _, item in items]
        )
        ended = [self._packed[self._keys[id(one)]].kept for one, item in items if is_last(item)]
        for sequence, item in items:
            if is_last(item):
                self.leave(sequence)
        if any(ended):
            return self._compared(items, ended)
        return items

    def _compared(
        self, items: list[tuple[BatchSequence, Item]], ended: Sequence[KeptStates | None]
    ) -> list[tuple[BatchSequence, Item]]:
        """`items` with the divergences of those that ended, in the order of their kept states."""
        kept = iter(ended)
        found: list[tuple[BatchSequence, Item]] = []
        for sequence, item in items:
            states = next(kept) if is_last(item) else None
            if states is not None and not isinstance(item, SteerError):
                try:
                    apart = self._divergences(sequence, states)
                    item = replace(item, readouts=joined((*item.readouts, *apart)))  # noqa: PLW2901
                except Exception as error:
                    item = failure_of(error)  # noqa: PLW2901
            found.append((sequence, item))
        return found

    def _divergences(self, sequence: BatchSequence, kept: KeptStates) -> list[TokenReadout]:
        """How far each token was chosen from what its twin would have chosen it from: one pass
        without the plan over a sequence that has ended."""
        prompt, said = sequence.request.prompt, sequence.tokens
        positions = tuple(range(len(prompt) - 1, sequence.fed))
        point = chosen_at(self.hooked.info)
        self.lend()
        request = CaptureRequest([(*prompt, *said[:-1])], (point,), positions)
        [twin] = capture_batch(self, request)
        apart = divergences(kept.take(sequence.fed), twin.states[point], self.instruments)
        return [
            TokenReadout(len(prompt) + n, token, (), kl)
            for n, (token, kl) in enumerate(zip(said, apart or (), strict=True))
        ]

    def leave(self, sequence: BatchSequence) -> None:
        """Takes a sequence out of the batch."""
        key = self._keys.pop(id(sequence))
        del self._packed[key]
        self.sequences = [s for s in self.sequences if s is not sequence]
        self.packed_model.remove(key)
        self.give_back(sequence.steered)

    def clear(self) -> list[BatchSequence]:
        """Takes every sequence out, after a failure; returns them."""
        left, self.sequences = self.sequences, []
        self._packed.clear()
        self._keys.clear()
        for sequence in left:
            self.give_back(sequence.steered)
        self.packed_model.reset()
        return left

    def lend(self) -> None:
        """Gives the model its own attention back until the next pass."""
        self.packed_model.lend()

    def prove(self) -> None:
        """The start-up proof, for plain passes and packed ones; raises `Unsupported`."""
        prove_steering(self.hooked)
        prove_packed(self.packed_model)

    def _readings(self, chunks: Sequence[Chunk]) -> Readings | None:
        spans, offset = [], 0
        for chunk in chunks:
            packed = self._packed[chunk.key]
            spans += [
                ReadSpan(seer, offset, chunk.start, chunk.length)
                for seer in (packed.sequence.reads, packed.kept)
                if seer is not None
            ]
            offset += chunk.length
        return self.readings(spans)

    def _step(self, chunks: Sequence[Chunk]) -> Step | None:
        """The step of a pass; the same object as long as nobody's slots can change."""
        for chunk in chunks:
            self._check_place(self._packed[chunk.key], chunk)
        order = tuple(chunk.key for chunk in chunks)
        # A final chunk of one token is the next token of its sequence, never an old one.
        decoding = all(chunk.length == 1 and chunk.final for chunk in chunks)
        if decoding and self._carried is not None and self._carried[0] == order:
            carried = self._carried[1]
            if carried.carry_on():
                return carried.step
        spans, offset = [], 0
        for chunk in chunks:
            packed = self._packed[chunk.key]
            if packed.sequence.steered.plan is not None:
                spans.append(_span(packed, chunk, offset))
            offset += chunk.length
        step = build_step(self.tables, self.ledger, spans, offset)
        if decoding:
            each = (self._packed[key].sequence.fixed_for for key in order)
            passes = min(each, default=0) - 1
            self._carried = (order, CarriedStep(step, passes))
        return step

    def _check_place(self, packed: _Packed, chunk: Chunk) -> None:
        """A chunk continues its sequence, or begins it anew after a preemption."""
        if chunk.start == packed.computed:
            return
        if chunk.start != 0:
            raise EngineError(
                f"transformers planned tokens from position {chunk.start} of a sequence of which "
                f"{packed.computed} are computed: the states between them would not be ours"
            )
        self.ledger.recount(packed.sequence.steered.row)


def _span(packed: _Packed, chunk: Chunk, offset: int) -> Span:
    positions = np.arange(chunk.start, chunk.start + chunk.length, dtype=np.int64)
    tokens = np.array(packed.ids(chunk.start, chunk.length), dtype=np.int64)
    return Span(packed.sequence.steered, offset, positions, tokens)
