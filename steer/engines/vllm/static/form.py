"""The general tier on CUDA: edits in a kernel that CUDA graphs capture, from static buffers.

Where a graph is replayed no Python runs, so a pass is described before it and looked at after it:
`StaticForm.begin` writes who is in the batch, the operators `steer::edit_pair` and
`steer::edit_one` launch one kernel per tap (while a graph is captured, and in passes without a
graph), and `StaticPass.finish` takes down what was done. What depends on
the model's states (which gates opened) is known on the device alone; it is copied back without
waiting and written down by `collect`.

T tokens of a pass, Q requests in it, P rules of a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.encoders import DeviceEncoders
from steer.batch.gates import Decisions
from steer.batch.ledger import PositionLedger
from steer.batch.requests import Ints, Span
from steer.batch.tables import MAX_RULES
from steer.engines.vllm.static.tables import (
    DECIDES,
    FOLLOWERS,
    FOLLOWS,
    MEASURED,
    NOT_EDITED,
    RAMPED,
    ROW,
    SELECTED,
    SLOT,
    TOKEN_FIELDS,
    StaticTables,
    StepBuffers,
)
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.taps import ADDED, points_of
from steer.errors import EngineError
from steer.model import HookPoint, ModelInfo
from steer.plan.plan import SteeringPlan

Fault = Callable[[str], None]
"""Told why a pass did not do what it had to."""

_LAST_EPOCH = 2**31 - 1
_RULES = (1 << MAX_RULES) - 1
"""All rules, as bits."""


class StaticForm:
    """The static buffers of one worker, and the kernel that reads them.

    `taps` are those that this worker owns. Needs Triton.

    Assumes: `begin`, `finish` and `collect` are called by one thread, in the order of the passes,
    on the stream that the model runs on; at most `max_requests` requests are steered in a pass.
    Guarantees: between `begin` and `finish` nothing is allocated and nothing is decided in Python;
    the rest of the buffers is slot 0, so that padding and dummy passes are left alone.
    """

    def __init__(
        self,
        model: ModelInfo,
        taps: Sequence[int],
        *,
        max_requests: int,
        batch_tokens: int,
        edit_rows: int,
        device: torch.device,
        latents: int = 0,
        encoders: DeviceEncoders | None = None,
    ) -> None:
        """`latents` is how many of TopK SAEs the tokens of one pass may rank together; `encoders`
        may be shared with other tables on `device`."""
        from steer.engines.vllm.static.kernel import edit_group  # noqa: PLC0415

        self._launch, self.latents = edit_group, latents
        self._ledger: Callable[[], PositionLedger] = _no_ledger
        points = [
            [p for p in points_of(tap, model.n_layers) if p.site in model.sites] for tap in taps
        ]
        served = [(tap, group) for tap, group in zip(taps, points, strict=True) if group]
        self._groups = {tap: number for number, (tap, _) in enumerate(served)}
        self._streams = [
            sum(1 << n for n, point in enumerate(group) if point.site not in ADDED)
            for _, group in served
        ]
        groups = [group for _, group in served]
        self.tables = StaticTables(
            model, groups, slots=max_requests, edit_rows=edit_rows, device=device, encoders=encoders
        )
        self.buffers = StepBuffers(
            self.tables,
            batch_tokens=batch_tokens,
            requests=max_requests,
            latents=latents,
            programs=_programs(device),
        )
        self._bits = torch.arange(MAX_RULES, dtype=torch.int32, device=device)
        self._written = 0
        self._epoch = 0
        self._waiting: deque[_Report] = deque()
        self._last: StaticPass | None = None
        """The last pass that steered, whose `lost` may still come."""

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        """What passes do is written down in the ledger that `ledger` gives from now on."""
        self._ledger, self._last = ledger, None
        self.buffers.lost.zero_()

    def edit(self, tap: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Launches the kernel for the hook points of `tap`; what an operator does."""
        group = self._groups.get(tap)
        if group is not None and len(hidden):
            streams = self._streams[group]
            self._launch(self.tables, self.buffers, group, hidden, residual, streams)

    def begin(self, spans: Sequence[Span], tokens_in_batch: int, fault: Fault) -> StaticPass | None:
        """Makes the pass over `spans` the one that the kernels run; None where it steers nobody.

        The same pass may be run again as long as no token's rules change and no plan is gated.
        """
        self.collect()
        self._take_lost()
        self._last = None
        steered = [span for span in spans if span.request.rules]
        if not steered:
            self.clear()
            return None
        self._check_room(len(steered), tokens_in_batch)
        records = np.zeros((tokens_in_batch, TOKEN_FIELDS), dtype=np.int32)
        opened = np.zeros(tokens_in_batch, dtype=np.int32)
        factors = np.ones((tokens_in_batch, MAX_RULES), dtype=np.float32)
        ramped = False
        for row, span in enumerate(steered):
            place = span.place
            records[place] = _records(span, row)
            selected = records[place, SELECTED] & _RULES
            opened[place] = selected & ~_gated(_plan(span))
            mine = span.request.factors(span.positions)
            if mine is not None:
                factors[place, : len(mine)] = mine.T
                ramped = True
        self._upload(self.buffers.tokens, records)
        self._upload(self.buffers.opened, opened)
        if ramped:
            self._upload(self.buffers.factors, factors)
        self._make_room_to_rank(steered, tokens_in_batch)
        self._forget(tokens_in_batch)
        self._epoch = self._epoch % _LAST_EPOCH + 1
        self.buffers.epoch.fill_(self._epoch)
        running = StaticPass(self, self._ledger, steered, records, self._epoch, fault)
        self._last = running
        if running.measured:  # a pass that failed, or a dummy pass, may have left some
            self.buffers.sizes[:, :tokens_in_batch] = NOT_EDITED
        if running.holds:
            self._recall(running.rows)
        return running

    def clear(self) -> None:
        """Steers nobody in the passes that come."""
        self._forget(0)

    def collect(self, *, wait: bool = False) -> None:
        """Writes down what finished passes did, in their order, as far as it has come back.

        With `wait`, all of it: needed before a row is read, or given to another request.
        """
        while self._waiting and (wait or self._waiting[0].arrived()):
            self._waiting.popleft().write(self._ledger())
        if wait:
            self._take_lost()

    def report_later(self, running: StaticPass, positions: Ints, tokens: int) -> None:
        """Asks for what a pass over `tokens` tokens did; `collect` writes it down."""
        used = self.tables.groups + tokens
        self._waiting.append(_Report(running, positions, *_bring_back(self.buffers.report[:used])))
        self.collect()

    def _check_room(self, requests: int, tokens: int) -> None:
        if requests > self.buffers.requests or tokens > self.buffers.batch_tokens:
            raise AssertionError(f"{requests} requests with {tokens} tokens in one pass")

    def _make_room_to_rank(self, spans: Sequence[Span], tokens: int) -> None:
        """Gives each token that ranks latents a place for them."""
        ranking = [(span, size) for span in spans if (size := _plan(span).latents)]
        if not ranking:
            return
        places, end = np.zeros(tokens, dtype=np.int32), 0
        for span, size in ranking:
            count = len(span.positions)
            places[span.place] = end + size * np.arange(count)
            end += size * count
        if end > len(self.buffers.latents):
            raise AssertionError(f"{end} latents to rank in one pass")
        self._upload(self.buffers.latents_at, places)

    def _recall(self, rows: Ints) -> None:
        """Brings back what gates decided in earlier passes. A gate reads before anything that it
        rules, so the kernel opens it where it reads."""
        buffers, ledger = self.buffers, self._ledger()
        index = torch.from_numpy(rows).to(buffers.held.device)
        decided = ledger.gate_open.index_select(0, index)
        buffers.held[: len(rows)] = (decided << self._bits).sum(1, dtype=torch.int32)
        buffers.values[: len(rows)] = ledger.gate_value.index_select(0, index)

    def take(self, running: StaticPass, decisions: Decisions) -> None:
        """Opens what gates of earlier stages opened, and keeps what they decided for requests."""
        buffers = self.buffers
        place, ruled = self._index(running.present), self._index(running.ruled_elsewhere)
        buffers.opened[place] |= (decisions.opened[place] & ruled).int()
        place, rows = self._index(running.deciding), self._index(running.deciding_rows)
        ruled = self._index(running.elsewhere[running.deciding_rows])
        held = (buffers.held[rows] & ~ruled) | (decisions.opened[place] & ruled)
        buffers.held[rows] = held.int()
        theirs = (ruled[:, None] >> self._bits & 1).bool()
        read = torch.where(theirs, decisions.values[place], buffers.values[rows])
        buffers.values[rows] = read

    def decisions(self, running: StaticPass) -> Decisions:
        """What gates of this stage and of those before it have decided in a pass."""
        buffers = self.buffers
        found = Decisions.none(running.tokens, buffers.held.device)
        place, rows = self._index(running.present), self._index(running.present_rows)
        found.opened[place] = buffers.opened[place]
        if running.holds:
            found.opened[place] |= buffers.held[rows]
            found.values[place] = buffers.values[rows]
        return found

    def remember(self, rows: Ints) -> None:
        """Keeps the decisions of this pass's requests, whose ledger rows are `rows`."""
        buffers, ledger = self.buffers, self._ledger()
        index = torch.from_numpy(rows).to(buffers.held.device)
        held = buffers.held[: len(rows), None] >> self._bits & 1
        ledger.gate_open[index] = held.bool()
        ledger.gate_value[index] = buffers.values[: len(rows)]

    def count_sizes(self, running: StaticPass) -> None:
        """Takes the relative sizes of a pass into the ledger, which expects its tokens, and starts
        from none again."""
        sizes = self.buffers.sizes[:, : running.tokens]
        rows, places, _ = running.on_device
        for point in running.measured:
            mine = sizes[self.tables.index(point)].index_select(0, places)
            self._ledger().add_relative(point, rows, mine, mine != NOT_EDITED)
        sizes.fill_(NOT_EDITED)

    def _take_lost(self) -> None:
        """Writes down which tokens an edit would have driven beyond all numbers. Waits for no
        device; passes that are carried on gather it, and none of their tokens is drafted."""
        if self._last is not None:
            lost = self.buffers.lost[: self._last.tokens]
            rows, places, positions = self._last.on_device
            self._ledger().lose(rows, positions, lost.index_select(0, places) != 0)
            lost.zero_()

    def _forget(self, kept: int) -> None:
        """Makes slot 0 of the tokens from `kept` on that the last pass named."""
        if kept < self._written:
            self.buffers.tokens[kept : self._written] = 0
            self.buffers.opened[kept : self._written] = 0
        self._written = kept

    def _index(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self.buffers.held.device)

    def _upload(self, target: Tensor, values: NDArray[np.int32] | NDArray[np.float32]) -> None:
        source = torch.from_numpy(values)
        if target.is_cuda:
            # Pinned memory of its own for each pass: the last copy may still be under way.
            source = source.pin_memory()
        target[: len(values)].copy_(source, non_blocking=True)


class StaticPass:
    """One pass as it was described to the kernels."""

    def __init__(
        self,
        form: StaticForm,
        ledger: Callable[[], PositionLedger],
        spans: Sequence[Span],
        records: NDArray[np.int32],
        epoch: int,
        fault: Fault,
    ) -> None:
        self.epoch, self.fault = epoch, fault
        self._form, self._ledger, self._spans = form, ledger, spans
        plans = [_plan(span) for span in spans]
        self.rows: Ints = np.array([span.request.row for span in spans], dtype=np.int64)
        """The ledger row of each request."""
        self.tokens = len(records)
        self.present: Ints = np.concatenate(
            [np.arange(span.offset, span.offset + len(span.positions)) for span in spans]
        )
        """The tokens of the batch that belong to these requests, one request after another."""
        self.present_rows: Ints = records[self.present, ROW].astype(np.int64)
        """The row of each of these tokens among the requests of this pass."""
        self.token_rows = self.rows[self.present_rows]
        self._begun_at: Ints = self._positions
        """Where these tokens stood when the pass was begun."""
        self.expected = frozenset[int]().union(*map(form.tables.groups_of, plans))
        self.holds = any(_holds(plan) for plan in plans)
        """Whether gates are decided, or were, that a request holds."""
        self._gated = any(plan.gated for plan in plans)
        self._bits = (records[self.present, SELECTED] & _RULES).astype(np.int64)
        self.measured: tuple[HookPoint, ...] = tuple(
            {
                p
                for span, plan in zip(spans, plans, strict=True)
                if span.request.measure
                for p in plan.points
            }
        )
        self._proved = False
        self.elsewhere: Ints = np.array([_elsewhere(plan) for plan in plans], dtype=np.int64)
        """The rules of each request whose gates an earlier stage decides, as bits."""
        self.ruled_elsewhere: Ints = self.elsewhere[self.present_rows] & self._bits
        """Those that select each present token."""
        self.deciding: Ints = np.flatnonzero(records[:, SELECTED] & DECIDES)
        """The tokens that decide for their requests, and the rows of these."""
        self.deciding_rows: Ints = records[self.deciding, ROW].astype(np.int64)
        self._lacks_decisions = bool(self.elsewhere.any())

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """The ledger rows of `present`, `present`, and where these tokens stood at first."""
        device = self._form.tables.device
        of_tokens = (self.token_rows, self.present, self._begun_at)
        rows, places, positions = (torch.from_numpy(one).to(device) for one in of_tokens)
        return rows, places, positions

    @property
    def _positions(self) -> Ints:
        return np.concatenate([span.positions for span in self._spans])

    def start(self) -> None:
        """The kernels run it already: it was written into their buffers."""

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        """The same tokens' slots are edited again, by the same factors: there is nothing to
        change."""
        assert not changes

    def take(self, decisions: Decisions) -> None:
        if self._lacks_decisions:
            self._form.take(self, decisions)
            self._lacks_decisions = False

    def decisions(self) -> Decisions | None:
        return self._form.decisions(self) if self._gated else None

    def finish(self) -> None:
        """Takes down what the pass did; without gates that is known already."""
        if self._lacks_decisions:
            self.fault(
                "an earlier pipeline stage did not hand on what gates decided, so the result is "
                "withheld"
            )
        if self.holds:
            self._form.remember(self.rows)
        positions, ledger = self._positions, self._ledger()
        ledger.expect(self.token_rows, positions)
        if self.measured:
            self._form.count_sizes(self)
        if not self._gated:
            ledger.record(self.token_rows, self._bits)
        if self._gated or not self._proved:
            self._proved = True
            self._form.report_later(self, positions, self.tokens)

    def write(self, ledger: PositionLedger, positions: Ints, report: NDArray[np.int32]) -> None:
        """Writes down what came back; a pass whose taps were not all reached is at fault."""
        groups = self._form.tables.groups
        missed = sorted(g for g in self.expected if report[g] != self.epoch)
        if missed:
            tables = self._form.tables
            names = [str(tables.points[tables.first_points[group]]) for group in missed]
            self.fault(
                f"the forward pass never reached {', '.join(names)}: the edits there were not "
                "applied, so the result is withheld"
            )
        if self._gated:
            bits = report[groups:][self.present].astype(np.int64)
            ledger.expect(self.token_rows, positions)
            ledger.record(self.token_rows, bits)


@dataclass
class _Report:
    """What a pass did, on its way back from the device."""

    running: StaticPass
    positions: Ints
    content: Tensor
    event: Any

    def arrived(self) -> bool:
        return self.event is None or bool(self.event.query())

    def write(self, ledger: PositionLedger) -> None:
        if self.event is not None:
            self.event.synchronize()
        self.running.write(ledger, self.positions, self.content.numpy())


def _bring_back(values: Tensor) -> tuple[Tensor, Any]:
    """A copy of `values` in the host's memory, and the event after which it is there."""
    if not values.is_cuda:
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event


def _programs(device: torch.device) -> int:
    """The programs of a launch that a device runs at once, of those as large as ours one on each
    multiprocessor; one where they run behind one another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _plan(span: Span) -> SteeringPlan:
    assert span.request.plan is not None
    return span.request.plan


def _gated(plan: SteeringPlan) -> int:
    """The rules with a gate, as bits."""
    return sum((one.gate is not None) << number for number, one in enumerate(plan.rules))


def _holds(plan: SteeringPlan) -> bool:
    """Whether a gate of `plan` is decided by the prompt, and then held."""
    return any(one.gate is not None and one.gate.prompt_scope for one in plan.rules)


def _elsewhere(plan: SteeringPlan) -> int:
    """The rules whose gate an earlier stage of a pipeline decides, as bits."""
    return sum(
        (one.gate is not None and one.gate.elsewhere) << number
        for number, one in enumerate(plan.rules)
    )


def _records(span: Span, row: int) -> NDArray[np.int32]:
    """The records `[T, 4]` of the tokens of one request, in the `row` of this pass."""
    request, count = span.request, len(span.positions)
    found = np.zeros((count, TOKEN_FIELDS), dtype=np.int32)
    found[:, SLOT] = request.slot
    found[:, ROW] = row
    for number, slots in enumerate(request.slots(span.positions, span.tokens)):
        found[:, SELECTED] |= (slots != 0).astype(np.int32) << number
    if request.measure:
        found[:, SELECTED] |= MEASURED
    if _plan(span).ramped:
        found[:, SELECTED] |= RAMPED
    last = np.flatnonzero(span.positions == request.prompt_length - 1)
    if len(last) and _holds(_plan(span)):
        (place,) = last
        found[place, SELECTED] |= DECIDES
        found[place, FOLLOWERS] = count - 1 - place
        found[place + 1 :, SELECTED] |= FOLLOWS
    return found


def _no_ledger() -> PositionLedger:
    raise AssertionError("the form is bound to no ledger")


_form: StaticForm | None = None


def set_form(form: StaticForm | None) -> None:
    """Makes `form` the one that the operators launch: a process has one model that is steered."""
    global _form  # noqa: PLW0603
    _form = form


def _edit(hidden: Tensor, residual: Tensor | None, tap: int) -> None:
    if _form is None:
        raise EngineError("a tap was reached before its tables were made")
    _form.edit(tap, hidden, residual)
    # Where a graph is captured or replayed, nobody runs in Python.
    ops.visit(tap, hidden, residual)


def _edit_pair(hidden: Tensor, residual: Tensor, tap: int) -> None:
    _edit(hidden, residual, tap)


def _edit_one(hidden: Tensor, tap: int) -> None:
    _edit(hidden, None, tap)


def _nothing(*_: object) -> None:
    """What the operators do to tensors without data."""


_library: Any = torch.library.Library("steer", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("edit_pair(Tensor(a!) hidden, Tensor(b!) residual, int tap) -> ()")
_library.define("edit_one(Tensor(a!) hidden, int tap) -> ()")
_library.impl("edit_pair", _edit_pair, "CompositeExplicitAutograd")
_library.impl("edit_one", _edit_one, "CompositeExplicitAutograd")
torch.library.register_fake("steer::edit_pair", _nothing, lib=_library)
torch.library.register_fake("steer::edit_one", _nothing, lib=_library)
