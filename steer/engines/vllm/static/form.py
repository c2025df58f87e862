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
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.encoders import DeviceEncoders
from steer.batch.gates import Decisions
from steer.batch.ledger import SHUT, PositionLedger
from steer.batch.ramps import Ramps
from steer.batch.requests import Ints, Span
from steer.batch.tables import MAX_RULES
from steer.engines.vllm.static.passes import (
    Fault,
    PassReport,
    StaticPass,
    bring_back,
    plan_of,
    records_of,
)
from steer.engines.vllm.static.tables import (
    NOT_EDITED,
    TOKEN_FIELDS,
    StaticTables,
    StepBuffers,
)
from steer.engines.vllm.taps.taps import ADDED, points_of
from steer.model import ModelInfo

_LAST_EPOCH = 2**31 - 1


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
        from steer.engines.vllm.static.kernel.launch import edit_group  # noqa: PLC0415

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
        self._waiting: deque[PassReport] = deque()
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
        """Makes the pass over `spans` the one that the kernels run; None where it steers nobody."""
        self.collect()
        self._take_lost()
        self._last = None
        steered = [span for span in spans if span.request.rules]
        if not steered:
            self.clear()
            return None
        self._check_room(len(steered), tokens_in_batch)
        records = np.zeros((tokens_in_batch, TOKEN_FIELDS), dtype=np.int32)
        for row, span in enumerate(steered):
            records[span.place] = records_of(span, row)
        ramps = Ramps.of(steered, (MAX_RULES, tokens_in_batch))
        if ramps is not None:
            self.weigh(ramps)
        self._make_room_to_rank(steered, tokens_in_batch)
        self._forget(tokens_in_batch)
        self._epoch = self._epoch % _LAST_EPOCH + 1
        self.buffers.epoch.fill_(self._epoch)
        running = StaticPass(self, self._ledger, steered, records, self._epoch, fault, ramps)
        self._upload(self.buffers.tokens, records)
        self._upload(self.buffers.opened, running.opened)
        self._last = running
        if running.measured:  # a pass that failed, or a dummy pass, may have left some
            self.buffers.sizes[:, :tokens_in_batch] = NOT_EDITED
        if running.holds:
            self._recall(running)
        return running

    def carry_on(self, running: StaticPass, *, changed: bool) -> None:
        """Makes the pass `running`, taken a token further, the one that the kernels run again;
        `changed` is whether rules select other tokens than before."""
        if changed:
            self._upload(self.buffers.tokens, running.records)
        if changed or running.gated:
            self._upload(self.buffers.opened, running.opened)
        if running.onward.any():
            self._recall(running)

    def clear(self) -> None:
        """Steers nobody in the passes that come."""
        self._forget(0)

    def weigh(self, ramps: Ramps) -> None:
        """Hands the kernels the factors of the tokens of the coming pass."""
        self._upload(self.buffers.factors, np.ascontiguousarray(ramps.factors.T))

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
        report = bring_back(self.buffers.report[:used])
        self._waiting.append(PassReport(running, positions, *report))
        self.collect()

    def _check_room(self, requests: int, tokens: int) -> None:
        if requests > self.buffers.requests or tokens > self.buffers.batch_tokens:
            raise AssertionError(f"{requests} requests with {tokens} tokens in one pass")

    def _make_room_to_rank(self, spans: Sequence[Span], tokens: int) -> None:
        """Gives each token that ranks latents a place for them."""
        ranking = [(span, size) for span in spans if (size := plan_of(span).latents)]
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

    def _recall(self, running: StaticPass) -> None:
        """Brings back what gates decided in earlier passes. A gate reads before anything that it
        rules, so the kernel opens it where it reads."""
        buffers, ledger, count = self.buffers, self._ledger(), len(running.rows)
        index = self._index(running.rows)
        decided = ledger.gate_open.index_select(0, index)
        if running.onward.any():
            decided = decided | self._opened_before(running, index)
        buffers.held[:count] = (decided << self._bits).sum(1, dtype=torch.int32)
        buffers.values[:count] = ledger.gate_value.index_select(0, index)

    def _opened_before(self, running: StaticPass, index: Tensor) -> Tensor:
        """Which onward gates of the requests in the ledger's rows `index` were opened before the
        tokens of this pass; that one of these opened it is forgotten."""
        ledger, onward = self._ledger(), self._ruled(running.onward)
        onset = ledger.onset.index_select(0, index)
        before = onset < self._index(running.begins)[:, None]
        ledger.onset[index] = torch.where(onward & ~before, SHUT, onset)
        return onward & before

    def take(self, running: StaticPass, decisions: Decisions) -> None:
        """Opens what gates of earlier stages opened, and keeps what they decided for requests."""
        buffers = self.buffers
        place, ruled = self._index(running.present), self._index(running.ruled_elsewhere)
        buffers.opened[place] |= (decisions.opened[place] & ruled).int()
        place, rows = self._index(running.deciding), self._index(running.deciding_rows)
        by_prompt = running.elsewhere & ~running.onward
        ruled = self._index(by_prompt[running.deciding_rows])
        held = (buffers.held[rows] & ~ruled) | (decisions.opened[place] & ruled)
        buffers.held[rows] = held.int()
        theirs = (ruled[:, None] >> self._bits & 1).bool()
        read = torch.where(theirs, decisions.values[place], buffers.values[rows])
        buffers.values[rows] = read
        onward = running.elsewhere & running.onward
        if onward.any():
            held, values = (of[: len(running.rows)] for of in (buffers.held, buffers.values))
            place = self._index(running.first_places)
            opening = decisions.opened[place] & ~held & self._index(onward)
            opening = (opening[:, None] >> self._bits & 1).bool()
            values.copy_(torch.where(opening, decisions.values[place], values))

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

    def remember(self, running: StaticPass) -> None:
        """Keeps the decisions of this pass's requests."""
        buffers, ledger, count = self.buffers, self._ledger(), len(running.rows)
        index = self._index(running.rows)
        held = (buffers.held[:count, None] >> self._bits & 1).bool()
        ledger.gate_value[index] = buffers.values[:count]
        if running.onward.any():
            onward = self._ruled(running.onward)
            held &= ~onward
            # Of these requests the pass has one token each; of others the first does no harm.
            begins = self._index(running.begins)[:, None]
            opened = buffers.opened[self._index(running.first_places), None] >> self._bits & 1
            found = torch.where(onward & opened.bool(), begins, SHUT)
            ledger.onset[index] = torch.minimum(ledger.onset.index_select(0, index), found)
        ledger.gate_open[index] = held

    def _ruled(self, rules: Ints) -> Tensor:
        """Which rules `[Q, P]` are among `rules` `[Q]`, bits."""
        return (self._index(rules)[:, None] >> self._bits & 1).bool()

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


def _programs(device: torch.device) -> int:
    """The programs of a launch that a device runs at once, of those as large as ours one on each
    multiprocessor; one where they run behind one another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _no_ledger() -> PositionLedger:
    raise AssertionError("the form is bound to no ledger")
