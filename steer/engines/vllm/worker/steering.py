"""A worker's steering: from vLLM's schedule of a step to the pass that its model's taps reach.

The adapters of vLLM's model runners tell three things: which requests come and go, which tokens
of which requests the next forward pass computes, and when that pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.batch.requests import NOBODY, Ints, Span
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.base import EngineStats
from steer.engines.vllm.static.form import StaticForm, StaticPass
from steer.engines.vllm.static.tables import StaticTables
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.shifts import Key, ShiftTables, only_shifts
from steer.engines.vllm.taps.taps import tap_of
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.prepared import Batch, Prepared, ScheduledRequest
from steer.engines.vllm.worker.requests import WorkerRequest, WorkerRequests
from steer.errors import CapacityError, EngineError
from steer.model import HookPoint, ModelInfo
from steer.plan.plan import SteeringPlan


class WorkerSteering:
    """Assumes: called by the worker's thread alone.

    Guarantees: `begin` never raises for one request's sake; between `end` and `begin` no pass is
    running, and the model's taps do nothing.
    """

    def __init__(
        self,
        model: ModelInfo,
        load: Callable[[str], SteeringPlan],
        *,
        max_requests: int,
        device: torch.device,
        shifts: ShiftTables | None,
        form: StaticForm | None = None,
        owns: Callable[[HookPoint], bool] = lambda _: True,
        stages: int = 1,
    ) -> None:
        """`form` is given where edits run in the static form. `owns` says which hook points lie
        on this worker, one of `stages` of a pipeline; plans that `load` gives edit these alone."""
        self.model, self.shifts = model, shifts
        self.owns, self.stages = owns, stages
        self.form = form
        self.tables: Tables | StaticTables = (
            Tables(model, slots=max_requests, device=device) if form is None else form.tables
        )
        self.requests = WorkerRequests(
            self.tables,
            load,
            rows=2 * max_requests,
            max_length=model.max_length,
            inline=lambda plan: shifts is not None and only_shifts(plan),
            owns=owns,
            collect=lambda: None if form is None else form.collect(wait=True),
        )
        self.recover()
        self._carried: tuple[tuple[str, ...], Prepared] | None = None
        self._prepared: Prepared | None = None

    def recover(self) -> None:
        """Takes the static buffers back after others have used them."""
        if self.form is not None:
            self.form.bind(lambda: self.requests.ledger)
            self.form.clear()
        if self.shifts is not None:
            self.shifts.clear()

    def admit(self, req_id: str, prompt: Sequence[int] | None, ticket: Ticket | None) -> None:
        """A request is scheduled for the first time, or again after a preemption."""
        if ticket is not None:
            self._carried = None
            if not self.requests.resume(req_id, ticket):
                self.requests.admit(req_id, prompt, ticket)

    def retire(self, req_id: str) -> None:
        """A request has ended; unknown ones are ignored."""
        if self.requests.get(req_id) is not None:
            self._carried = None
            self.requests.retire(req_id)

    @property
    def busy(self) -> bool:
        """Whether any request that runs, or waits in preemption, is steered or read."""
        return len(self.requests) > 0

    def rest(self) -> None:
        """The coming pass steers nobody."""
        ops.set_running(None)
        if self.form is not None:
            self.form.clear()
        if self.shifts is not None:
            self.shifts.rest()

    def begin(self, batch: Batch) -> None:
        """Makes the pass over `batch` the one that the taps reach."""
        decoding = bool((batch.counts == 1).all())
        order = tuple(batch.req_ids)
        prepared = self._carried_on(order, batch) if decoding else None
        if prepared is None:
            prepared = self._prepare(batch)
            lasting = decoding and all(self._lasts(placed) for placed in prepared.placed)
            self._carried = (order, prepared) if lasting else None
        self._prepared = prepared
        self.requests.ledger.expect(prepared.rows, prepared.positions)
        if isinstance(prepared.running, ForwardPass):
            ops.set_running(prepared.running)

    def abandon(self) -> None:
        """The pass failed: nothing is counted."""
        ops.set_running(None)
        self._prepared = self._carried = None

    def end(self) -> None:
        """The pass is over: counts what it did. A request whose edits were not all reached is at
        fault from then on, and its answer is withheld."""
        ops.set_running(None)
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        if prepared.running is not None:
            try:
                prepared.running.finish()
            except EngineError as error:
                self._at_fault(prepared.placed, error.message)
        prepared.write_inline(self.requests.ledger)

    def stats(self) -> EngineStats:
        """WorkerRequest figures: slots, and the requests that hold them."""
        return EngineStats(
            slots=self.tables.slots,
            slots_in_use=self.tables.in_use,
            requests_running=len(self.requests),
        )

    def _carried_on(self, order: tuple[str, ...], batch: Batch) -> Prepared | None:
        """The pass before, taken on by a token, where that is enough."""
        if self._carried is None or self._carried[0] != order:
            return None
        prepared = self._carried[1]
        return prepared if prepared.carry_on(batch, self.shifts) else None

    def _lasts(self, placed: ScheduledRequest) -> bool:
        """Whether a pass with this request can be carried on. A pass of the static form can as long
        as its tokens' slots stay the same."""
        request = placed.request
        if self.form is not None and request.plan is not None:
            return placed.fixed and not request.reads_tokens and not request.plan.gated
        return placed.fixed

    def _prepare(self, batch: Batch) -> Prepared:
        total = int(batch.counts.sum())
        offsets = np.cumsum(batch.counts) - batch.counts
        placed = [
            ScheduledRequest(
                request, n, int(offsets[n]), int(batch.starts[n]), _ids(batch, n, request)
            )
            for n, req_id in enumerate(batch.req_ids)
            if (request := self.requests.get(req_id)) is not None and request.fault is None
        ]
        rows = np.full(total, NOBODY, dtype=np.int64)
        positions = np.zeros(total, dtype=np.int64)
        for one in placed:
            positions[one.place] = np.arange(one.start, one.start + len(one.ids))
        inline, inline_selected = self._assign_shifts(
            [one for one in placed if one.request.inline], total
        )
        general = [one for one in placed if not one.variants and one.request.plan is not None]
        for one in general:
            rows[one.place] = one.request.row
        spans = self._spans(general, positions)
        running = self._pass(spans, [one for one in placed if one.request.states], general, total)
        return Prepared(
            placed,
            rows,
            positions,
            inline,
            _joined([np.arange(one.place.start, one.place.stop) for one in inline]),
            np.repeat([one.request.row for one in inline], [len(one.ids) for one in inline]),
            _joined(inline_selected),
            running,
        )

    def _spans(self, placed: Sequence[ScheduledRequest], positions: Ints) -> list[Span]:
        """The tokens of requests that have a steered in the tables; one that finds no room is at
        fault, and its answer will be withheld."""
        requests = [one.request for one in placed]
        spans = []
        for one in placed:
            try:
                steered = self.requests.steered(one.request, lambda: requests)
            except CapacityError as error:
                one.request.fault = error.message
            else:
                spans.append(Span(steered, one.offset, positions[one.place], one.ids))
        return spans

    def _pass(
        self,
        spans: Sequence[Span],
        reading: Sequence[ScheduledRequest],
        general: Sequence[ScheduledRequest],
        total: int,
    ) -> ForwardPass | StaticPass | None:
        """The pass that steers `spans` and keeps the states that `reading` requests ask for."""
        if self.form is not None:
            return self.form.begin(spans, total, lambda why: self._at_fault(general, why))
        assert isinstance(self.tables, Tables)
        reads_tokens = {one.offset for one in general if one.request.reads_tokens}
        step = build_step(
            self.tables, self.requests.ledger, spans, total, reads_tokens=reads_tokens
        )
        wanted = frozenset(point for one in reading for point in one.request.states)
        if step is None and not wanted:
            return None
        keep = (lambda point, x: _keep(reading, point, x)) if wanted else None
        return ForwardPass(step, total, self.model.n_layers, wanted, keep)

    def _at_fault(self, placed: Sequence[ScheduledRequest], why: str) -> None:
        self._carried = None
        for one in placed:
            one.request.fault = why

    def _assign_shifts(
        self, placed: Sequence[ScheduledRequest], total: int
    ) -> tuple[list[ScheduledRequest], list[Ints]]:
        """Names the variants of the tokens that the compiled graph steers by itself; the requests
        that found room, and for each the rules that select its tokens."""
        if self.shifts is None:
            return [], []
        selected = [one.request.selected(one.start, one.ids).astype(np.int64) for one in placed]
        wanted = [
            {(one.request.ticket.fingerprint, chosen) for chosen in set(mine.tolist())}
            for one, mine in zip(placed, selected, strict=True)
        ]
        keep: set[Key] = set().union(*wanted)
        variants = np.zeros(total, dtype=np.int64)
        inline, recorded = [], []
        for one, mine, keys in zip(placed, selected, wanted, strict=True):
            plan = one.request.plan
            assert plan is not None
            numbers = {0: 0}
            for key in keys:
                number = self.shifts.find(plan, key[1], tap_of, keep)
                if number is None:
                    break
                numbers[key[1]] = number
            else:
                one.variants = numbers
                variants[one.place] = [numbers[chosen] for chosen in mine.tolist()]
                inline.append(one)
                recorded.append(mine)
        self.shifts.assign(torch.from_numpy(variants))
        return inline, recorded


def _ids(batch: Batch, index: int, request: WorkerRequest) -> Ints:
    """The tokens of a request in `batch`; −1 for each where its plan does not read them."""
    if request.ticket.reads_tokens:
        return batch.ids(index)
    return np.full(int(batch.counts[index]), -1, dtype=np.int64)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _keep(reading: Sequence[ScheduledRequest], point: HookPoint, x: Tensor) -> None:
    """Copies the states `[T, d]` that the requests in `reading` asked for at `point`."""
    for one in reading:
        kept = one.request.states.get(point)
        if kept is None or one.request.ticket.capture is None:
            continue
        for row, position in enumerate(one.request.ticket.capture.positions):
            place = position - one.start
            if 0 <= place < len(one.ids):
                kept[row] = x[one.offset + place].detach().float().cpu()


def take_note(steering: WorkerSteering, output: Any) -> None:
    """Ends the requests that `output` ends, and then takes in those that it starts.

    A preempted request has not ended. In runner V2 it comes again among the new ones.
    """
    for req_id in output.finished_req_ids:
        steering.retire(req_id)
    for new in output.scheduled_new_reqs:
        params = new.sampling_params
        ticket = Ticket.of(params.extra_args) if params is not None else None
        steering.admit(new.req_id, new.prompt_token_ids, ticket)
