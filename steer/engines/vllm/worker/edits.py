"""Two ways in which a worker's edits run: in Python at the model's taps, or in kernels.

`WorkerSteering` says who is in the coming pass; what carries it out is one of these. Kernels over
static buffers (`static/form.py`) are what CUDA graphs can replay; Python at the taps runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span
from steer.batch.slots import SlotTables
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.vllm.static.form import Fault, StaticForm
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.inner_sites import Shard
from steer.engines.vllm.worker.prepared import RunningPass, ScheduledRequest
from steer.model import HookPoint, ModelInfo
from steer.spec import Site


@dataclass(frozen=True)
class ComingPass:
    """What the next pass has to do, over `tokens` tokens.

    `spans` are steered through the tables; `steered` are their requests, `reading` those that ask
    for states. `fault` is told why the pass did not do what it had to.
    """

    spans: Sequence[Span]
    steered: Sequence[ScheduledRequest]
    reading: Sequence[ScheduledRequest]
    tokens: int
    fault: Fault


class Edits(Protocol):
    """Assumes: called by the worker's thread alone, in the order of the passes."""

    @property
    def static(self) -> bool:
        """Whether edits run in kernels over static buffers."""

    @property
    def tables(self) -> SlotTables[Any]: ...

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        """What passes do is written into the ledger that `ledger` gives from now on."""

    def rehearsal(self, requests: int) -> Edits:
        """Edits for a start-up proof of so many requests; `bind` and `rest` give back what it
        takes."""

    def lasts(self, request: ScheduledRequest) -> bool:
        """Whether a pass with this request can be carried on, what it selects being fixed."""

    def begin(self, coming: ComingPass) -> RunningPass | None:
        """Makes `coming` the pass that the taps reach; None where it does nothing."""

    def rest(self) -> None:
        """The coming passes steer nobody through the tables."""

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
    ) -> None:
        """`shards` are the sites whose rows are split over workers."""
        self._model, self.tables = model, Tables(model, slots=requests, device=device)
        self._shards = shards or {}
        self._ledger: Callable[[], PositionLedger] | None = None

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        self._ledger = ledger

    def rehearsal(self, requests: int) -> TapEdits:
        return TapEdits(self._model, requests, self.tables.device, self._shards)

    def lasts(self, request: ScheduledRequest) -> bool:  # noqa: ARG002 - slots may change
        return True

    def begin(self, coming: ComingPass) -> ForwardPass | None:
        assert self._ledger is not None
        step = build_step(
            self.tables,
            self._ledger(),
            coming.spans,
            coming.tokens,
            reads_tokens={one.offset for one in coming.steered if one.request.reads_tokens},
        )
        wanted = frozenset(point for one in coming.reading for point in one.request.states)
        if step is None and not wanted:
            return None
        keep = (lambda point, x: _keep(coming.reading, point, x)) if wanted else None
        return ForwardPass(step, coming.tokens, self._model.n_layers, wanted, keep, self._shards)

    def rest(self) -> None:
        """Taps look at the running pass alone."""

    def collect(self) -> None:
        """Passes have written down everything themselves."""


class StaticEdits:
    """`Edits` in kernels over static buffers."""

    static = True

    def __init__(self, form: StaticForm) -> None:
        self._form, self.tables = form, form.tables

    def bind(self, ledger: Callable[[], PositionLedger]) -> None:
        self._form.bind(ledger)

    def rehearsal(self, requests: int) -> StaticEdits:  # noqa: ARG002 - taps know no other buffers
        return self

    def lasts(self, request: ScheduledRequest) -> bool:
        """As long as its tokens' slots stay the same."""
        plan = request.request.plan
        return plan is None or not (request.request.reads_tokens or plan.gated)

    def begin(self, coming: ComingPass) -> RunningPass | None:
        return self._form.begin(coming.spans, coming.tokens, coming.fault)

    def rest(self) -> None:
        self._form.clear()

    def collect(self) -> None:
        self._form.collect(wait=True)


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
