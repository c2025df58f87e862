"""Two ways in which a worker's edits run: in Python at the model's taps, or in kernels.

`WorkerSteering` says who is in the coming pass; what carries it out is one of these. Kernels over
static buffers (`static/form.py`) are what CUDA graphs can replay; Python at the taps runs wherever
no graph is replayed, and there it does what kernels do not: it takes states out of the pass, and
chooses among all latents of an SAE. A worker with kernels has it beside them, for the requests that
ask for such things and for the steps that they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from steer.batch.encoders import DeviceEncoders
from steer.batch.gates import Decisions
from steer.batch.ledger import PositionLedger
from steer.batch.requests import Ints, Span
from steer.batch.slots import SlotTables
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.graph_room import GraphRoom, Scheduled
from steer.engines.vllm.static.passes import Fault
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.inner_sites import Shard
from steer.engines.vllm.taps.switch import TapSwitch
from steer.engines.vllm.taps.taps import layer_of
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.prepared import RunningPass, ScheduledRequest
from steer.engines.vllm.worker.requests import WorkerRequest
from steer.model import HookPoint, ModelInfo
from steer.readouts.readings import Readings
from steer.spec import Site

TablesOf = Callable[[Ticket, int], SlotTables[Any]]
"""The tables in which the plan of a request with this ticket has its slot, in a step that computes
so many tokens of it."""


@dataclass(frozen=True)
class ComingPass:
    """What the next pass has to do, over `tokens` tokens.

    `spans` are steered through the tables; `steered` are their requests, `reading` those that ask
    for states; `readings` are what is read of tokens. `fault` is told why the pass did not do
    what it had to.
    """

    spans: Sequence[Span]
    steered: Sequence[ScheduledRequest]
    reading: Sequence[ScheduledRequest]
    tokens: int
    fault: Fault
    readings: Readings | None = None


class Edits(Protocol):
    """Assumes: called by the worker's thread alone, in the order of the passes."""

    @property
    def static(self) -> bool:
        """Whether edits run in kernels over static buffers."""

    @property
    def tables(self) -> SlotTables[Any]:
        """The tables of requests that may run inside CUDA graphs; of all, where there are none."""

    @property
    def in_use(self) -> int:
        """Slots that running requests hold, of all tables."""

    def tables_for(self, scheduled: Scheduled) -> TablesOf:
        """Where plans have their slots in a step that computes `scheduled`."""

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        """What passes do is written into the ledger that `ledger` gives from now on."""

    def rehearsal(self, requests: int) -> Edits:
        """Edits for a start-up proof of so many requests; `bind` and `rest` give back what it
        takes."""

    def graphless(self, scheduled: Scheduled) -> bool:
        """Whether a step that computes `scheduled` must run without its CUDA graph."""

    def begin(self, coming: ComingPass) -> RunningPass | None:
        """Makes `coming` the pass that the taps reach; None where it does nothing."""

    def rest(self) -> None:
        """The coming passes steer nobody through the tables."""

    def open_taps(self, layer: int) -> None:
        """Puts the taps of `layer` in place until `rest`, where they are not always."""

    def collect(self) -> None:
        """Writes down what finished passes did, all of it."""


class TapEdits:
    """`Edits` in Python, at the taps of an eager engine or in opaque operators."""

    static = False

    def __init__(
        self,
        model: ModelInfo,
        requests: int,
        device: torch.device,
        shards: Mapping[Site, Shard] | None = None,
        encoders: DeviceEncoders | None = None,
        switch: TapSwitch | None = None,
    ) -> None:
        """`shards` are the sites whose rows are split over workers; `encoders` may be shared with
        other tables on `device`. Taps that have a `switch` are in place while they are needed."""
        self._model = model
        self.tables = Tables(model, slots=requests, device=device, encoders=encoders)
        self._shards, self._switch = shards or {}, switch
        self._ledger: Callable[[], PositionLedger] | None = None

    @property
    def in_use(self) -> int:
        return self.tables.in_use

    def tables_for(self, scheduled: Scheduled) -> TablesOf:  # noqa: ARG002 - all are alike here
        return lambda *_: self.tables

    def graphless(self, scheduled: Scheduled) -> bool:  # noqa: ARG002 - Python runs in every step
        return False

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        self._ledger = ledger

    def rehearsal(self, requests: int) -> TapEdits:
        return TapEdits(
            self._model, requests, self.tables.device, self._shards, switch=self._switch
        )

    def begin(self, coming: ComingPass) -> ForwardPass | None:
        assert self._ledger is not None
        step = build_step(
            self.tables,
            self._ledger(),
            coming.spans,
            coming.tokens,
            reads_tokens={one.offset for one in coming.steered if one.request.changes},
        )
        wanted = frozenset(point for one in coming.reading for point in one.request.states)
        if step is None and not wanted and coming.readings is None:
            self.rest()
            return None
        keep = _Keep(coming.reading) if wanted else None
        found = ForwardPass(
            step,
            coming.tokens,
            self._model.n_layers,
            wanted,
            keep,
            self._shards,
            readings=coming.readings,
        )
        if self._switch is not None:
            self._switch.turn(frozenset(map(layer_of, found.taps)))
        return found

    def rest(self) -> None:
        if self._switch is not None:
            self._switch.turn(frozenset())

    def open_taps(self, layer: int) -> None:
        if self._switch is not None:
            self._switch.turn(frozenset({layer}))

    def collect(self) -> None:
        """Passes have written down everything themselves."""


class StaticEdits:
    """`Edits` in kernels over static buffers, with `TapEdits` beside them for requests whose steps
    run without their graph (`GraphRoom`)."""

    static = True

    def __init__(self, form: StaticForm, graphless: TapEdits) -> None:
        self._form, self.tables, self._graphless = form, form.tables, graphless
        self._room = GraphRoom(form.latents)
        self._ledger: Callable[[], PositionLedger] | None = None

    @property
    def in_use(self) -> int:
        return self.tables.in_use + self._graphless.in_use

    def tables_for(self, scheduled: Scheduled) -> TablesOf:
        excludes = partial(self._room.excludes, full=self._room.full(scheduled))
        python, kernels = self._graphless.tables, self.tables
        return lambda ticket, tokens: python if excludes(ticket, tokens) else kernels

    def graphless(self, scheduled: Scheduled) -> bool:
        full = self._room.full(scheduled)
        return any(self._room.excludes(*one, full=full) for one in scheduled)

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        self._ledger = ledger
        self._form.bind(ledger)
        self._graphless.bind(ledger)

    def rehearsal(self, requests: int) -> StaticEdits:
        """Its kernels write into the same buffers: taps know no others."""
        return StaticEdits(self._form, self._graphless.rehearsal(requests))

    def begin(self, coming: ComingPass) -> RunningPass | None:
        apart = [one for one in coming.steered if self._in_python(one.request)]
        places = {one.offset for one in apart}
        spans = [span for span in coming.spans if span.offset not in places]
        kernels = self._form.begin(spans, coming.tokens, coming.fault)
        if not apart and not coming.reading and coming.readings is None:
            return kernels
        others = [span for span in coming.spans if span.offset in places]
        taps = self._graphless.begin(replace(coming, spans=others, steered=apart))
        if taps is None or kernels is None:
            return taps or kernels
        assert self._ledger is not None
        return MixedPass(kernels, taps, others, self._ledger)

    def _in_python(self, request: WorkerRequest) -> bool:
        """Whether Python steers a request in the coming pass, or reads its states."""
        return request.tables is self._graphless.tables

    def rest(self) -> None:
        self._form.clear()

    def open_taps(self, layer: int) -> None:
        """Graphs were captured with them."""

    def collect(self) -> None:
        self._form.collect(wait=True)


class MixedPass:
    """A pass in which kernels steer some requests and Python, at the same taps, the others.

    Both change the rows of their own tokens alone, so that it does not matter who comes first.
    """

    def __init__(
        self,
        kernels: RunningPass,
        taps: RunningPass,
        spans: Sequence[Span],
        ledger: Callable[[], PositionLedger],
    ) -> None:
        """`spans` are those that `taps` steer."""
        self._kernels, self._taps, self._spans, self._ledger = kernels, taps, spans, ledger

    def start(self) -> None:
        self._kernels.start()
        self._taps.start()

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        in_python = {span.offset for span in self._spans}
        self._kernels.carry_on({at: one for at, one in changes.items() if at not in in_python})
        self._taps.carry_on({at: one for at, one in changes.items() if at in in_python})

    def take(self, decisions: Decisions) -> None:
        self._kernels.take(decisions)
        self._taps.take(decisions)

    def decisions(self) -> Decisions | None:
        mine, others = self._kernels.decisions(), self._taps.decisions()
        return mine.beside(others) if mine and others else mine or others

    def finish(self) -> None:
        self._kernels.finish()
        if self._spans:
            rows = [np.full(len(one.positions), one.request.row) for one in self._spans]
            positions = [one.positions for one in self._spans]
            self._ledger().expect(np.concatenate(rows), np.concatenate(positions))
        self._taps.finish()


class _Keep:
    """Copies the states `[T, d]` at a hook point that the requests in `reading` ask for: one copy
    from the device for each of them."""

    def __init__(self, reading: Sequence[ScheduledRequest]) -> None:
        self._parts = [(one.request.states, *_asked(one)) for one in reading]

    def __call__(self, point: HookPoint, x: Tensor) -> None:
        for states, rows, places in self._parts:
            if point in states and len(rows):
                index = torch.from_numpy(places).to(x.device)
                states[point][rows] = x.detach().index_select(0, index).float().cpu()


def _asked(one: ScheduledRequest) -> tuple[Ints, Ints]:
    """The rows of a request's states that the coming pass computes, and their tokens' places in
    the batch."""
    order = one.request.ticket.capture
    positions = np.array(order.positions if order is not None else (), dtype=np.int64)
    rows = np.flatnonzero((positions >= one.start) & (positions < one.start + len(one.ids)))
    return rows, positions[rows] - one.start + one.offset
