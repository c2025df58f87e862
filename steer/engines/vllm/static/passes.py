"""A pass of the static form: described to the kernels before it, taken down after it.

T tokens of a pass, Q requests in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.gates import Decisions
from steer.batch.ledger import PositionLedger
from steer.batch.ramps import Ramps
from steer.batch.requests import Ints, Span
from steer.batch.tables import MAX_RULES
from steer.engines.vllm.static.tables import (
    DECIDES,
    FOLLOWERS,
    FOLLOWS,
    MEASURED,
    RAMPED,
    ROW,
    SELECTED,
    SLOT,
    TOKEN_FIELDS,
)
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan

if TYPE_CHECKING:
    from steer.engines.vllm.static.form import StaticForm

Fault = Callable[[str], None]
"""Told why a pass did not do what it had to."""

RULES = (1 << MAX_RULES) - 1
"""All rules, as bits."""


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
        ramps: Ramps | None = None,
    ) -> None:
        self.epoch, self.fault, self._ramps = epoch, fault, ramps
        self._form, self._ledger, self._spans = form, ledger, spans
        plans = [plan_of(span) for span in spans]
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
        self.holds = any(_decides(plan) or plan.onward for plan in plans)
        """Whether gates are decided, or were, that a request holds."""
        self.gated = any(plan.gated for plan in plans)
        self.records = records
        """What the kernels know of each token of the batch."""
        self._free: Ints = ~np.array([gated_rules(plan) for plan in plans], dtype=np.int64)
        """The rules of each request that have no gate, as bits, and all others of 64."""
        self.measured: tuple[HookPoint, ...] = tuple(
            {
                p
                for span, plan in zip(spans, plans, strict=True)
                if span.request.measure
                for p in plan.points
            }
        )
        self._finished = False
        """Whether it has run once: by then it is known that all taps were reached, and what prompts
        decided."""
        self.elsewhere: Ints = np.array([_elsewhere(plan) for plan in plans], dtype=np.int64)
        """The rules of each request whose gates an earlier stage decides, as bits."""
        self.deciding: Ints = np.flatnonzero(records[:, SELECTED] & DECIDES)
        """The tokens that decide for their requests, and the rows of these."""
        self.deciding_rows: Ints = records[self.deciding, ROW].astype(np.int64)
        self._lacks_decisions = bool(self.elsewhere.any())
        self.onward: Ints = np.array([plan.onward for plan in plans], dtype=np.int64)
        """The rules of each request whose gate is onward, as bits; of such a request the pass has
        one token."""
        self.first_places: Ints = np.array([span.offset for span in spans], dtype=np.int64)
        """Of each request's first token in this pass the place in the batch."""

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """The ledger rows of `present`, `present`, and where these tokens stood at first."""
        device = self._form.tables.device
        of_tokens = (self.token_rows, self.present, self._begun_at)
        rows, places, positions = (torch.from_numpy(one).to(device) for one in of_tokens)
        return rows, places, positions

    @property
    def selected(self) -> Ints:
        """The rules that select each present token, as bits."""
        found: Ints = (self.records[self.present, SELECTED] & RULES).astype(np.int64)
        return found

    @property
    def opened(self) -> NDArray[np.int32]:
        """Those of each token of the batch that act on it whatever gates decide."""
        found = np.zeros(self.tokens, dtype=np.int32)
        found[self.present] = self.selected & self._free[self.present_rows]
        return found

    @property
    def ruled_elsewhere(self) -> Ints:
        """Those that select each present token, of which an earlier stage decides the gate."""
        return self.selected & self.elsewhere[self.present_rows]

    @property
    def begins(self) -> Ints:
        """The position of each request's first token in this pass."""
        return np.array([span.positions[0] for span in self._spans], dtype=np.int64)

    @property
    def _positions(self) -> Ints:
        return np.concatenate([span.positions for span in self._spans])

    def start(self) -> None:
        """The kernels run it already: it was written into their buffers."""

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        """Takes the same requests a token further; `changes` are the slots `[P]` of the tokens that
        have others now. Nothing is built anew: one buffer is written where tokens have other rules,
        another where gates may have opened some of those that were written there."""
        for place, slots in changes.items():
            bits = int(np.bitwise_or.reduce((slots != 0).astype(np.int32) << np.arange(len(slots))))
            self.records[place, SELECTED] = self.records[place, SELECTED] & ~RULES | bits
        self._form.carry_on(self, changed=bool(changes))
        if self._ramps is not None and self._ramps.carry_on():
            self._form.weigh(self._ramps)
        self._lacks_decisions = bool(self.elsewhere.any())

    def take(self, decisions: Decisions) -> None:
        if self._lacks_decisions:
            self._form.take(self, decisions)
            self._lacks_decisions = False

    def decisions(self) -> Decisions | None:
        return self._form.decisions(self) if self.gated else None

    def finish(self) -> None:
        """Takes down what the pass did; without gates that is known already."""
        if self._lacks_decisions:
            self.fault(
                "an earlier pipeline stage did not hand on what gates decided, so the result is "
                "withheld"
            )
        first, self._finished = not self._finished, True
        # What the last prompt token decided stays as it is, however far the pass is carried on.
        if self.holds and (first or self.onward.any()):
            self._form.remember(self)
        positions, ledger = self._positions, self._ledger()
        ledger.expect(self.token_rows, positions)
        if self.measured:
            self._form.count_sizes(self)
        if not self.gated:
            ledger.record(self.token_rows, self.selected)
        if self.gated or first:
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
        if self.gated:
            bits = report[groups:][self.present].astype(np.int64)
            ledger.expect(self.token_rows, positions)
            ledger.record(self.token_rows, bits)


@dataclass
class PassReport:
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


def bring_back(values: Tensor) -> tuple[Tensor, Any]:
    """A copy of `values` in the host's memory, and the event after which it is there."""
    if not values.is_cuda:
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event


def plan_of(span: Span) -> SteeringPlan:
    assert span.request.plan is not None
    return span.request.plan


def gated_rules(plan: SteeringPlan) -> int:
    """The rules with a gate, as bits."""
    return sum((one.gate is not None) << number for number, one in enumerate(plan.rules))


def _decides(plan: SteeringPlan) -> bool:
    """Whether a gate of `plan` is decided by the prompt, and then held."""
    return any(one.gate is not None and one.gate.prompt_scope for one in plan.rules)


def _elsewhere(plan: SteeringPlan) -> int:
    """The rules whose gate an earlier stage of a pipeline decides, as bits."""
    return sum(
        (one.gate is not None and one.gate.elsewhere) << number
        for number, one in enumerate(plan.rules)
    )


def records_of(span: Span, row: int) -> NDArray[np.int32]:
    """The records `[T, 4]` of the tokens of one request, in the `row` of this pass."""
    request, count = span.request, len(span.positions)
    found = np.zeros((count, TOKEN_FIELDS), dtype=np.int32)
    found[:, SLOT] = request.slot
    found[:, ROW] = row
    for number, slots in enumerate(request.slots(span.positions, span.tokens)):
        found[:, SELECTED] |= (slots != 0).astype(np.int32) << number
    if request.measure:
        found[:, SELECTED] |= MEASURED
    if plan_of(span).ramped:
        found[:, SELECTED] |= RAMPED
    last = np.flatnonzero(span.positions == request.prompt_length - 1)
    if len(last) and _decides(plan_of(span)):
        (place,) = last
        found[place, SELECTED] |= DECIDES
        found[place, FOLLOWERS] = count - 1 - place
        found[place + 1 :, SELECTED] |= FOLLOWS
    return found
