"""The running batch: sequences that join, take one step together, and leave.

Prompts are computed apart and their cache rows adopted; from then on every decode step is one
forward pass over all rows. Rows are kept in the order of the cache's rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steer.engines.base import (
    FinishReason,
    GateReceipt,
    GenerationRequest,
    PointReceipt,
    Receipt,
    TokenEvent,
)
from steer.engines.transformers.cache import RollingCache
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.prompts import run_prompts
from steer.engines.transformers.sampling import Sampler, choose, logprobs
from steer.step import Ledger, Seat, Span, Step, build_step
from steer.tables import Tables


@dataclass
class Running:
    """A request that runs, and what it has produced so far."""

    request: GenerationRequest
    seat: Seat
    sampler: Sampler
    limit: int
    tokens: list[int] = field(default_factory=list)

    @property
    def fed(self) -> int:
        """Tokens the model has computed: the last one generated is never fed back."""
        return len(self.request.prompt) + len(self.tokens) - 1


class RollingBatch:
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
    ) -> None:
        self.hooked, self.tables, self.rows = hooked, tables, rows
        self.eos, self._prefill_tokens, self._chunk = eos, prefill_tokens, chunk
        self.ledger = Ledger(2 * rows, tables.device)
        self.sequences: list[Running] = []
        self._cache = RollingCache(hooked.info.n_layers, hooked.device)
        self._free_rows = list(range(2 * rows - 1, -1, -1))
        self._steady: Step | None = None
        self._steady_known = False

    @property
    def free(self) -> int:
        """Places left for new sequences."""
        return self.rows - len(self.sequences)

    def seat(self, request: GenerationRequest) -> Seat:
        """Takes a slot and a ledger row; raises `CapacityError` when all slots are in use."""
        slot = 0 if request.plan is None else self.tables.acquire(request.plan)
        row = self._free_rows.pop()
        self.ledger.reset(row)
        return Seat(row, len(request.prompt), request.plan, slot, request.measure)

    def unseat(self, seat: Seat) -> None:
        """Gives back what `seat` took."""
        if seat.plan is not None:
            self.tables.release(seat.plan)
        self._free_rows.append(seat.row)

    def join(self, newcomers: Sequence[Running]) -> list[tuple[Running, TokenEvent]]:
        """Computes the prompts, samples their first tokens and adds the sequences to the batch.

        Prompts of like length are computed together, at most `prefill_tokens` at a time.
        """
        events: list[tuple[Running, TokenEvent]] = []
        for group in self._groups(newcomers):
            done = run_prompts(
                self.hooked,
                self.tables,
                self.ledger,
                [s.seat for s in group],
                [s.request.prompt for s in group],
                chunk=self._chunk,
            )
            if done.logits is None:
                raise AssertionError("the last chunk computes logits")
            self._cache.adopt(done.cache, done.mask)
            self.sequences.extend(group)
            events += self._take(group, done.logits[:, -1])
        self._changed()
        return events

    def decode(self) -> list[tuple[Running, TokenEvent]]:
        """One token for every sequence."""
        logits = self._forward()
        self._cache.advance()
        return self._take(self.sequences, logits)

    def leave(self, sequence: Running) -> None:
        """Takes a sequence out of the batch."""
        row = next(n for n, s in enumerate(self.sequences) if s is sequence)
        self._cache.remove(row)
        last = self.sequences.pop()
        if last is not sequence:
            self.sequences[row] = last
        self.unseat(sequence.seat)
        self._changed()

    def clear(self) -> list[Running]:
        """Takes every sequence out, after a failure; returns them."""
        left, self.sequences = self.sequences, []
        # The failed pass may have left the cache half-written.
        self._cache = RollingCache(self.hooked.info.n_layers, self.hooked.device)
        for sequence in left:
            self.unseat(sequence.seat)
        self._steady_known = False
        return left

    def _forward(self) -> Tensor:
        device = self.hooked.device
        ids = torch.tensor([[s.tokens[-1]] for s in self.sequences], device=device)
        places = torch.tensor([[s.fed] for s in self.sequences], device=device)
        step = self._step()
        outputs, _ = self.hooked.forward(
            step,
            input_ids=ids,
            attention_mask=self._cache.mask(1),
            position_ids=places,
            past_key_values=self._cache.cache,
            use_cache=True,
        )
        logits: Tensor = outputs.logits[:, -1].float()
        return logits

    def _step(self) -> Step | None:
        """The step of this decode; the same object as long as nobody's slots can change."""
        if self._steady_known:
            return self._steady
        spans = [
            Span(
                s.seat,
                row,
                np.array([s.fed], dtype=np.int64),
                np.array([s.tokens[-1]], dtype=np.int64),
            )
            for row, s in enumerate(self.sequences)
            if s.seat.plan is not None
        ]
        step = build_step(self.tables, self.ledger, spans, len(self.sequences))
        if all(_is_steady(s) for s in self.sequences):
            self._steady, self._steady_known = step, True
        return step

    def _changed(self) -> None:
        self._steady_known = False
        self._cache.trim()

    def _take(
        self, sequences: Sequence[Running], logits: Tensor
    ) -> list[tuple[Running, TokenEvent]]:
        """Samples from each row; finished sequences leave the batch."""
        samplers = [s.sampler for s in sequences]
        tokens = choose(logits, samplers)
        events = []
        for sequence, token, logprob in zip(
            list(sequences), tokens, logprobs(logits, tokens, samplers), strict=True
        ):
            sequence.tokens.append(token)
            finish: FinishReason | None = None
            if self._ends(sequence.request, token):
                finish = "stop"
            elif len(sequence.tokens) >= sequence.limit:
                finish = "length"
            receipt = self.receipt(sequence) if finish else None
            events.append((sequence, TokenEvent(token, logprob, finish, receipt)))
        for sequence, event in events:
            if event.finish:
                self.leave(sequence)
        return events

    def _ends(self, request: GenerationRequest, token: int) -> bool:
        if token in self.eos and not request.sampling.ignore_eos:
            return True
        return request.stop is not None and request.stop(token)

    def receipt(self, sequence: Running) -> Receipt | None:
        """What was applied to `sequence` until now; None for an unsteered request."""
        seat = sequence.seat
        if seat.plan is None:
            return None
        return make_receipt(seat, self.ledger, sequence.fed)

    def _groups(self, newcomers: Sequence[Running]) -> list[list[Running]]:
        groups: list[list[Running]] = []
        longest = 0
        for sequence in sorted(newcomers, key=lambda s: len(s.request.prompt)):
            length = len(sequence.request.prompt)
            roomy = groups and (len(groups[-1]) + 1) * length <= self._prefill_tokens
            if roomy and length <= 2 * longest + 16:
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
                longest = length
        return groups


def make_receipt(seat: Seat, ledger: Ledger, fed: int) -> Receipt:
    """The receipt of a seat whose sequence fed `fed` tokens, from what the steps counted."""
    plan = seat.plan
    if plan is None:
        raise AssertionError("an unsteered request has no receipt")
    counts = ledger.tokens[seat.row]
    bits = np.arange(len(counts))
    steered = int(counts[1:].sum())
    points = []
    for point in plan.points:
        touching = sum(1 << n for n, one in enumerate(plan.passes) if point in one.blocks)
        tokens = int(counts[(bits & touching) != 0].sum())
        size = None
        if seat.measure and point in ledger.relative and tokens:
            size = float(ledger.relative[point][seat.row]) / tokens
        points.append(PointReceipt(point, tokens, size))
    gates = []
    for number, one in enumerate(plan.passes):
        if one.gate is not None:
            value = float(ledger.gate_value[seat.row, number])
            fired = int(counts[(bits & (1 << number)) != 0].sum())
            gates.append(GateReceipt(one.gate.name, fired, None if math.isnan(value) else value))
    return Receipt(plan.fingerprint, steered, fed - steered, 0, tuple(points), tuple(gates))


def _is_steady(sequence: Running) -> bool:
    plan = sequence.seat.plan
    if plan is None or not plan.passes:
        return True
    steady_from = sequence.seat.steady_from
    return not plan.gated and steady_from is not None and sequence.fed >= steady_from
