"""A worker's steering: from vLLM's schedule of a step to the pass that its model's taps reach.

The adapters of vLLM's model runners tell three things: which requests come and go, which tokens
of which requests the next forward pass computes, and when that pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.batch.gates import Decisions
from steer.batch.ledger import all_finite
from steer.batch.requests import NOBODY, Ints, Span
from steer.engines.base import EngineStats
from steer.engines.vllm.inside.layers import AttendedRows, AttentionLayers
from steer.engines.vllm.static.graph_room import Scheduled
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.shifts import NoShifts, Shifts, ShiftTables
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.edits import ComingPass, Edits, TablesOf
from steer.engines.vllm.worker.inline import assign_shifts
from steer.engines.vllm.worker.prepared import BatchTokens, Prepared, ScheduledRequest
from steer.engines.vllm.worker.requests import WorkerRequests
from steer.errors import CapacityError, EngineError
from steer.model import HookPoint, ModelInfo
from steer.plan.plan import SteeringPlan
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import Instruments
from steer.readouts.readings import Readings, ReadSpan


class WorkerSteering:
    """Assumes: called by the worker's thread alone.

    Guarantees: `begin` never raises for one request's sake; between `end` and `begin` no pass is
    running, and the model's taps do nothing.
    """

    def __init__(
        self,
        model: ModelInfo,
        load: Callable[[str], SteeringPlan],
        edits: Edits,
        *,
        max_requests: int,
        shifts: Shifts | None = None,
        owns: Callable[[HookPoint], bool] = lambda _: True,
        stages: int = 1,
        drafts: int = 0,
        load_readouts: Callable[[str], ReadoutPlan] | None = None,
        instruments: Instruments | None = None,
        attention: AttentionLayers | None = None,
    ) -> None:
        """`shifts` are given where a compiled graph adds constants by itself. `owns` says which
        hook points lie on this worker, one of `stages` of a pipeline; plans that `load` gives edit
        these alone. `drafts` is the most drafted tokens that a pass computes for a request.
        `load_readouts` and `instruments` are what requests are read with; `attention` tells what
        heads attend to, where that can be had."""
        self.model, self.edits, self.shifts = model, edits, shifts or NoShifts()
        self.owns, self.stages = owns, stages
        self.requests = WorkerRequests(
            model,
            edits.tables_for(()),
            load,
            rows=2 * max_requests,
            device=edits.tables.device,
            inline=self.shifts.carries,
            owns=owns,
            collect=edits.collect,
            drafts=drafts,
            load_readouts=load_readouts,
        )
        self._instruments = instruments or Instruments(edits.tables.device)
        self.attention = attention or AttentionLayers({}, frozenset())
        self.recover()
        self._carried: tuple[tuple[str, ...], Prepared] | None = None
        self._prepared: Prepared | None = None
        self._latest: Prepared | None = None
        """The last pass that was begun, until its logits have been looked at."""
        self._received: Decisions | None = None

    @property
    def instruments(self) -> Instruments:
        """What requests are read with."""
        return self._instruments

    @property
    def reads_lenses(self) -> bool:
        """Whether read-outs here may go through the model's head."""
        return self._instruments.unembed is not None

    @property
    def compiled(self) -> bool:
        """Whether a compiled graph adds constants by itself."""
        return isinstance(self.shifts, ShiftTables)

    def recover(self) -> None:
        """Takes the static buffers back after others have used them."""
        self.edits.bind(lambda: self.requests.ledger)
        self.edits.rest()
        self.shifts.clear()
        self._resting = True

    def admit(self, req_id: str, prompt: Sequence[int] | None, ticket: Ticket | None) -> None:
        """A request is scheduled for the first time, or again after a preemption."""
        if ticket is not None:
            self._carried = None
            if not self.requests.resume(req_id, ticket):
                self.requests.admit(req_id, prompt, ticket)
                request, order = self.requests.get(req_id), ticket.capture
                if request is not None and order is not None and order.attention:
                    length = len(request.prompt)
                    request.attention = self.attention.notes(order.attention, length)

    def returned(self, req_id: str, generated: int) -> None:
        """A request comes back after a preemption with so many `generated` tokens, of which the
        last was never computed: no other drafted token stayed. Unknown requests are ignored."""
        request = self.requests.get(req_id)
        if request is not None:
            self._settle([(request.row, len(request.prompt) + generated - 1)])

    def retire(self, req_id: str) -> None:
        """A request has ended; unknown ones are ignored."""
        if self.requests.get(req_id) is not None:
            self._carried = None
            self.requests.retire(req_id)

    @property
    def busy(self) -> bool:
        """Whether any request that runs, or waits in preemption, is steered or read."""
        return len(self.requests) > 0

    def graphless(self, tokens: Mapping[str, int]) -> bool:
        """Whether a step with so many tokens of each request must run without its CUDA graph."""
        if not (self.edits.static and self.busy):
            return False
        return self.edits.graphless(self._scheduled(tokens.items()))

    def rest(self) -> None:
        """The coming pass steers nobody."""
        self._received = None
        self.attention.rest()
        if self._resting:
            return
        self._latest = None
        ops.set_running(None)
        self.edits.rest()
        self.shifts.rest()
        self._resting = True

    def begin(self, batch: BatchTokens) -> None:
        """Makes the pass over `batch` the one that the taps reach."""
        self._resting = False
        decoding = bool((batch.counts == 1).all())
        order = tuple(batch.req_ids)
        prepared = self._carried_on(order, batch) if decoding else None
        if prepared is None:
            prepared = self._prepare(batch)
            self._carried = (order, prepared) if decoding else None
        self._prepared = self._latest = prepared
        self.requests.ledger.expect(prepared.rows, prepared.positions)
        self.attention.watch(prepared.attending)
        received, self._received = self._received, None
        if prepared.running is not None:
            if received is not None:
                prepared.running.take(received)
            prepared.running.start()

    def receive(self, decisions: Decisions) -> None:
        """An earlier stage of the pipeline has decided this in the coming pass."""
        self._received = decisions

    def decisions(self) -> Decisions | None:
        """What gates have decided in the last pass that was begun; None where nobody has one."""
        latest = self._latest
        return None if latest is None or latest.running is None else latest.running.decisions()

    def pause(self) -> None:
        """Between two steps nobody is steered; the next pass is built anew."""
        self.abandon()
        self.rest()

    @contextmanager
    def tapped(self, layer: int) -> Iterator[None]:
        """Between two steps: inside of the block the taps of `layer` are in place, and nobody is
        steered."""
        self.pause()
        self.edits.open_taps(layer)
        try:
            yield
        finally:
            self.edits.rest()

    def abandon(self) -> None:
        """The pass failed: nothing is counted."""
        ops.set_running(None)
        self.attention.rest()
        self._prepared = self._carried = self._latest = self._received = None

    def end(self) -> None:
        """The pass is over: counts what it did. A request whose edits were not all reached is at
        fault from then on, and its answer is withheld."""
        ops.set_running(None)
        self.attention.rest()
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        if prepared.running is not None:
            try:
                prepared.running.finish()
            except EngineError as error:
                self._at_fault(prepared.placed, error.message)
        prepared.write_inline(self.requests.ledger)
        if prepared.readings is not None:
            prepared.readings.finish()

    def look(self, hidden: Tensor, logits: Tensor) -> None:
        """Takes note of the requests of the last pass of whose rows of `logits` `[n, vocab]` one
        holds NaN, or nothing finite; whoever samples would choose any token there. They are made of
        the rows `hidden` `[n, d]`. Waits for no device."""
        prepared, self._latest = self._latest, None
        if prepared is None or not prepared.placed or _cannot_overflow(hidden):
            return
        rows, indices, positions = prepared.logit_rows(logits.device)
        if not len(indices):
            return
        # A copy of rows costs more than to look at as many again.
        few = 2 * len(indices) < len(logits)
        largest = logits.index_select(0, indices).amax(-1) if few else logits.amax(-1)[indices]
        self.requests.ledger.lose(rows, positions, ~largest.isfinite())

    def stats(self) -> EngineStats:
        """Live figures: slots, and the requests that hold them."""
        return EngineStats(
            slots=self.edits.tables.slots,
            slots_in_use=self.edits.in_use,
            requests_running=len(self.requests),
        )

    def _carried_on(self, order: tuple[str, ...], batch: BatchTokens) -> Prepared | None:
        """The pass before, taken on by a token, where that is enough."""
        if self._carried is None or self._carried[0] != order:
            return None
        prepared = self._carried[1]
        return prepared if prepared.carry_on(batch, self.shifts) else None

    def _prepare(self, batch: BatchTokens) -> Prepared:
        total = int(batch.counts.sum())
        placed = self._placed(batch)
        self._settle([(one.request.row, one.start) for one in placed])
        self._draft([one for one in placed if one.drafts])
        rows = np.full(total, NOBODY, dtype=np.int64)
        positions = np.zeros(total, dtype=np.int64)
        for one in placed:
            positions[one.place] = np.arange(one.start, one.start + len(one.ids))
        inline, inline_selected = assign_shifts(
            self.shifts, [one for one in placed if one.request.inline], total
        )
        general = [one for one in placed if not one.variants and one.request.plan is not None]
        scheduled = self._scheduled(zip(batch.req_ids, batch.counts.tolist(), strict=True))
        spans = self._spans(general, positions, self.edits.tables_for(scheduled))
        for span in spans:
            rows[span.place] = span.request.row
        reading = [one for one in placed if one.request.states]
        readings = Readings.of(
            [
                ReadSpan(seer, one.offset, one.start, len(one.ids))
                for one in placed
                for seer in one.request.seers
            ],
            self._instruments,
        )
        running = self.edits.begin(
            ComingPass(
                spans,
                general,
                reading,
                total,
                lambda why: self._at_fault(general, why),
                readings,
            )
        )
        return Prepared(
            placed,
            rows,
            positions,
            inline,
            _joined([np.arange(one.place.start, one.place.stop) for one in inline]),
            np.repeat([one.request.row for one in inline], [len(one.ids) for one in inline]),
            _joined(inline_selected),
            running,
            readings,
            [
                AttendedRows(one.request.attention, one.offset, one.start, len(one.ids))
                for one in placed
                if one.request.attention is not None
            ],
        )

    def _scheduled(self, tokens: Iterable[tuple[str, int]]) -> Scheduled:
        """The tickets of those requests that have one, with their tokens."""
        known = ((self.requests.get(req_id), count) for req_id, count in tokens)
        return [(one.ticket, count) for one, count in known if one is not None]

    def _placed(self, batch: BatchTokens) -> list[ScheduledRequest]:
        """The known requests of a pass that can be carried out."""
        drafts = np.zeros_like(batch.counts) if batch.drafts is None else batch.drafts
        logits = np.cumsum(1 + drafts) - (1 + drafts)
        return [
            ScheduledRequest(
                request,
                n,
                int(batch.offsets[n]),
                int(batch.starts[n]),
                batch.tokens_of(n, request.ticket.reads_tokens),
                int(drafts[n]),
                int(logits[n]),
            )
            for n, req_id in enumerate(batch.req_ids)
            if (request := self.requests.get(req_id)) is not None and request.fault is None
        ]

    def _settle(self, fed: Sequence[tuple[int, int]]) -> None:
        """Of the tokens drafted last for each row, those before a position stayed."""
        ledger = self.requests.ledger
        if fed and ledger.unsettled:
            self.edits.collect()
            rows, positions = np.array(fed, dtype=np.int64).T
            ledger.settle(rows, positions)

    def _draft(self, placed: Sequence[ScheduledRequest]) -> None:
        if placed:
            spans = [(one.request.row, one.first_draft, one.drafts) for one in placed]
            rows, first, counts = np.array(spans, dtype=np.int64).T
            self.requests.ledger.draft(rows, first, counts)

    def _spans(
        self, placed: Sequence[ScheduledRequest], positions: Ints, tables_of: TablesOf
    ) -> list[Span]:
        """The tokens of requests that have a place in the tables; one that finds no room is at
        fault, and its answer will be withheld."""
        requests = [one.request for one in placed]
        spans = []
        for one in placed:
            try:
                tables = tables_of(one.request.ticket, len(one.ids))
                steered = self.requests.steered(one.request, tables, lambda: requests)
            except CapacityError as error:
                one.request.fault = error.message
            else:
                spans.append(Span(steered, one.offset, positions[one.place], one.ids))
        return spans

    def _at_fault(self, placed: Sequence[ScheduledRequest], why: str) -> None:
        self._carried = None
        for one in placed:
            one.request.fault = why


def _cannot_overflow(hidden: Tensor) -> bool:
    """Whether logits of these rows are finite for certain, where a CPU sees that at a glance: it
    has far fewer of them to look at than of logits. Squares whose sum is finite leave no product
    with a weight beyond float32; float16 ends much earlier."""
    return hidden.device.type == "cpu" and hidden.dtype != torch.float16 and all_finite(hidden)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def take_note(steering: WorkerSteering, output: Any) -> None:
    """Ends the requests that `output` ends, and then takes in those that it starts.

    A preempted request has not ended. In runner V2 it comes again among the new ones, with all its
    tokens; in V1 among those that are known.
    """
    for req_id in output.finished_req_ids:
        steering.retire(req_id)
    for new in output.scheduled_new_reqs:
        params = new.sampling_params
        ticket = Ticket.of(params.extra_args) if params is not None else None
        steering.admit(new.req_id, new.prompt_token_ids, ticket)
        if new.prefill_token_ids is not None and new.prompt_token_ids is not None:
            generated = len(new.prefill_token_ids) - len(new.prompt_token_ids)
            steering.returned(new.req_id, generated)
    again = output.scheduled_cached_reqs
    if again.resumed_req_ids:
        for req_id, generated in zip(again.req_ids, again.num_output_tokens, strict=True):
            if req_id in again.resumed_req_ids:
                steering.returned(req_id, generated)
