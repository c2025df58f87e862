"""The requests that a worker knows: their plans, their places in the tables, what they leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.position_ledger import UNSEEN, PositionLedger
from steer.batch.requests import Ints, Seat
from steer.batch.slots import SlotTables
from steer.engines.base import Receipt
from steer.engines.receipts import receipt_of
from steer.engines.vllm.ticket import Ticket
from steer.errors import EngineError
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan

_KEPT_RECORDS = 4096
"""Finished requests whose receipts nobody has fetched; the oldest go first."""


@dataclass
class Live:
    """A request between its first scheduling and its end, running or preempted.

    `inline` is whether its plan runs in the compiled graph's constants. `fault` says why its plan
    cannot be carried out here; such a request never gets a receipt, so that its front end
    withholds the answer.
    """

    ticket: Ticket
    prompt: Ints
    plan: SteeringPlan | None
    row: int
    inline: bool = False
    fault: str | None = None
    seat: Seat | None = None
    """Set while the plan holds a slot of the tables."""
    settled_from: int = 0
    """The position from which on the passes that select a token depend on its id alone."""
    restless: bool = False
    """Whether they do depend on it."""
    states: dict[HookPoint, Tensor] = field(default_factory=dict)
    """Captured states by point, float32 `[positions, d]`; rows not reached yet are NaN."""
    _bits_of: dict[int, int] = field(default_factory=dict)

    def bits(self, start: int, ids: Ints) -> NDArray[np.uint8]:
        """The passes that select each of the tokens `ids` at positions from `start` on."""
        if start >= self.settled_from:
            if not self.restless:
                return np.full(len(ids), self.bits_of(-1), dtype=np.uint8)
            return np.array([self.bits_of(token) for token in ids.tolist()], dtype=np.uint8)
        positions = np.arange(start, start + len(ids), dtype=np.int64)
        return self.ticket.pattern(positions, len(self.prompt), ids)

    def bits_of(self, token: int) -> int:
        """The passes that select `token` at any position from `settled_from` on."""
        found = self._bits_of.get(token)
        if found is None:
            position = np.array([self.settled_from], dtype=np.int64)
            pattern = self.ticket.pattern(position, len(self.prompt), np.array([token]))
            found = self._bits_of[token] = int(pattern[0])
        return found


@dataclass(frozen=True)
class Record:
    """What a finished request leaves: all that its receipt is made from."""

    live: Live
    ledger: PositionLedger
    """A ledger of one row."""


class Seats:
    """Assumes: called between forward passes, by one thread.

    Guarantees: a scheduled request always finds a slot (those of requests that wait in preemption
    are taken back first); rows and slots are free again when a request has ended, however it did.
    """

    def __init__(
        self,
        tables: SlotTables[Any],
        load: Callable[[str], SteeringPlan],
        *,
        rows: int,
        max_length: int,
        inline: Callable[[SteeringPlan], bool],
        owns: Callable[[HookPoint], bool],
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """`settle` is called before the ledger is read: passes may still report to it."""
        self._settle = settle
        self._tables, self._load, self._inline, self._owns = tables, load, inline, owns
        self.ledger = PositionLedger(rows, max_length, tables.device)
        self._max_length = max_length
        self._free = list(range(rows - 1, -1, -1))
        self._live: dict[str, Live] = {}
        self._records: OrderedDict[str, dict[int, Record]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def get(self, req_id: str) -> Live | None:
        return self._live.get(req_id)

    def admit(self, req_id: str, prompt: Sequence[int] | None, ticket: Ticket) -> None:
        """Takes in a request that vLLM schedules for the first time."""
        if req_id in self._live:
            self.retire(req_id)
        plan, fault = None, None
        try:
            if prompt is None:
                raise EngineError("a prompt of embeddings has no tokens to steer")
            if ticket.plan is not None:
                plan = self._load(ticket.plan)
                self._tables.check(plan)
        except Exception as error:  # an exception here would end the engine for everybody
            plan, fault = None, str(error)
        ids = np.array(prompt if prompt is not None else (), dtype=np.int64)
        live = Live(ticket, ids, plan, self._row(), fault=fault)
        if plan is not None:
            # Inline constants go to one half of the stream: who measures or reads needs them apart.
            apart = ticket.measure or ticket.capture is not None
            live.inline = not apart and self._inline(plan)
            bounds = [one.settled_from(len(ids)) for one in ticket.selections]
            live.settled_from = max(bounds, default=0)
            live.restless = ticket.reads_tokens
        if ticket.capture is not None:
            count = len(ticket.capture.positions)
            for point in filter(self._owns, ticket.capture.points):
                width = self._tables.model.width(point.site)
                live.states[point] = torch.full((count, width), float("nan"))
        self.ledger.reset(live.row)
        self._live[req_id] = live

    def resume(self, req_id: str, ticket: Ticket) -> bool:
        """Whether this is a request that runs already and was preempted: it keeps what it has.

        A preemption takes nothing but, where others need it, the slot.
        """
        live = self._live.get(req_id)
        return live is not None and live.ticket.key == ticket.key

    def retire(self, req_id: str) -> None:
        """Ends a request: its slot and row are free, its record waits to be fetched."""
        live = self._live.pop(req_id, None)
        if live is None:
            return
        self._free_slot(live)
        self._settle()
        children = self._records.setdefault(live.ticket.key, {})
        children[_child(req_id, live.ticket)] = Record(live, self._row_of(live))
        self._free.append(live.row)
        while len(self._records) > _KEPT_RECORDS:
            self._records.popitem(last=False)

    def seat(self, live: Live, scheduled: Callable[[], Iterable[Live]]) -> Seat:
        """The seat of a request in the coming pass; `scheduled` are all that keep theirs."""
        if live.plan is None:
            raise AssertionError("only steered requests have seats")
        if live.seat is None:
            if not self._tables.can_acquire(live.plan):
                kept = {id(other) for other in scheduled()}
                for other in self._live.values():
                    if id(other) not in kept:
                        self._free_slot(other)
            slot = self._tables.acquire(live.plan)
            live.seat = Seat(live.row, len(live.prompt), live.plan, slot, live.ticket.measure)
        return live.seat

    def records(self, key: str) -> dict[int, Record]:
        """Everything known under a ticket's key, by choice: finished requests, and running ones
        as they are now."""
        self._settle()
        found = dict(self._records.get(key, {}))
        for req_id, live in self._live.items():
            if live.ticket.key == key:
                found[_child(req_id, live.ticket)] = Record(live, self._row_of(live))
        return found

    def forget(self, key: str) -> None:
        """Drops what finished requests left under `key`."""
        self._records.pop(key, None)

    def _row(self) -> int:
        if not self._free:
            rows = len(self.ledger.bits)
            self.ledger.grow()
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def _free_slot(self, live: Live) -> None:
        if live.seat is not None and live.plan is not None:
            self._tables.release(live.plan)
            live.seat = None

    def _row_of(self, live: Live) -> PositionLedger:
        return self.ledger.row(live.row)


def receipt(record: Record, fed: int) -> Receipt:
    """The receipt of a request that fed `fed` tokens. Raises `EngineError` where its plan could
    not be carried out, or where a token that it fed was neither computed nor cached."""
    live, ledger = record.live, record.ledger
    if live.fault is not None or live.plan is None:
        raise EngineError(
            f"the request was not steered, so its answer is withheld: {live.fault}",
            code="not_steered",
        )
    bits = ledger.bits[0, :fed].astype(np.int64)
    cached = bits == UNSEEN
    unseen = int(cached.sum())
    if cached[len(live.prompt) :].any() or len(bits) < fed:
        raise EngineError(
            "the forward passes that steered this request were not all seen, so its answer is "
            "withheld",
            code="steps_missed",
        )
    selected = _cached_bits(live, np.flatnonzero(cached)) if unseen else np.zeros(0, dtype=int)
    bits[cached] = selected
    counts = np.bincount(bits, minlength=ledger.tokens.shape[1])
    seat = Seat(0, len(live.prompt), live.plan, 0, live.ticket.measure)
    return receipt_of(seat, live.plan, ledger, counts, fed, cached=int((selected != 0).sum()))


def _cached_bits(live: Live, positions: Ints) -> Ints:
    """The passes that shaped cached tokens. A gate on single tokens was decided when the cached
    state was made and is not known here: its pass counts as closed."""
    bits = live.ticket.pattern(positions, len(live.prompt), live.prompt[positions]).astype(np.int64)
    for number, one in enumerate(live.plan.passes if live.plan is not None else ()):
        if one.gate is not None:
            bits &= ~(1 << number)
    return bits


def _child(req_id: str, ticket: Ticket) -> int:
    """Which of n choices a request is: vLLM puts its number in front of the parent's id."""
    if ticket.n == 1:
        return 0
    number = req_id.split("_", 1)[0]
    return int(number) if number.isdigit() else 0
