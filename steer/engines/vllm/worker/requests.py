"""The requests that a worker knows: their plans, their places in the tables, what they leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.ledger import RULES, UNSEEN, PositionLedger
from steer.batch.requests import Ints, SteeredRequest
from steer.batch.slots import SlotTables
from steer.engines.base import Receipt, SpeculationReceipt
from steer.engines.checks import not_finite
from steer.engines.receipts import receipt_of, shares_of
from steer.engines.vllm.inside.notes import AttentionNotes
from steer.engines.vllm.ticket import ReadoutOrder, Ticket
from steer.errors import EngineError, NotFinite, SteerError
from steer.model import HookPoint, ModelInfo
from steer.plan.plan import SteeringPlan
from steer.plan.selection import fixed_until, rules_selecting, trace_of
from steer.plan.texts.trace import TokenTrace
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readings import RequestReadouts, SeesRows
from steer.readouts.twins import KeptStates

_KEPT_RECORDS = 4096
"""Finished requests whose receipts nobody has fetched; the oldest go first."""


@dataclass
class WorkerRequest:
    """A request between its first scheduling and its end, running or preempted.

    `inline` is whether its plan runs in the compiled graph's constants. `fault` says why its plan
    cannot be carried out here; such a request never gets a receipt, so that its front end
    withholds the answer.
    """

    ticket: Ticket
    prompt: Ints
    plan: SteeringPlan | None
    row: int
    tables: SlotTables[Any]
    """Where its plan holds a slot, or will."""
    inline: bool = False
    fault: str | None = None
    told: bool = False
    """Whether what it leaves has been told, so that nobody will ask for it."""
    steered: SteeredRequest | None = None
    """Set while the plan holds a slot of the tables."""
    fixed_from: int = 0
    """The position from which on the rules that select a token depend on its id alone."""
    reads_tokens: bool = False
    """Whether they do depend on it."""
    varies: bool = False
    """Whether it does not say so alone, however late the token comes."""
    trace: TokenTrace | None = None
    """What its plan has to know of the tokens read so far."""
    states: dict[HookPoint, Tensor] = field(default_factory=dict)
    """Captured states by point, float32 `[positions, d]`; rows not reached yet are −inf, which no
    model computes throughout, while steering may make NaN."""
    attention: AttentionNotes | None = None
    """What attentions are handed for its prompt, where it asks."""
    readouts: RequestReadouts | None = None
    """What is read of its tokens, where it asks."""
    kept: KeptStates | None = None
    """The states that its tokens are chosen from, where it asks how far steering takes them."""
    _selected_by: dict[int, int] = field(default_factory=dict)

    def selected(self, start: int, ids: Ints) -> NDArray[np.uint8]:
        """The rules that select each of the tokens `ids` at positions from `start` on."""
        if self._by_token(start):
            if not self.reads_tokens:
                return np.full(len(ids), self.selected_by(-1), dtype=np.uint8)
            return np.array([self.selected_by(token) for token in ids.tolist()], dtype=np.uint8)
        if self.trace is not None:
            self.trace.read(start, ids)
        return self.rules(np.arange(start, start + len(ids), dtype=np.int64), ids)

    def selected_at(self, position: int, token: int) -> int:
        """The rules that select one `token` at `position`: `selected`, for less."""
        if self._by_token(position):
            return self.selected_by(token if self.reads_tokens else -1)
        return int(self.selected(position, np.array([token], dtype=np.int64))[0])

    def _by_token(self, position: int) -> bool:
        """Whether from `position` on a token's id alone says which rules select it."""
        return position >= self.fixed_from and not self.varies

    def fixed_until(self, position: int) -> int:
        """The position up to which the rules that select tokens from `position` on depend on their
        ids alone, unless it `varies`; `position` where it is the prompt's."""
        return fixed_until(self.ticket.selections, position, len(self.prompt))

    @property
    def seers(self) -> tuple[SeesRows, ...]:
        """Who sees its tokens in a pass."""
        return tuple(one for one in (self.readouts, self.kept) if one is not None)

    @property
    def tells_overflow(self) -> bool:
        """Whether somebody is told where its numbers run over: a receipt, or whoever captures."""
        return self.plan is not None or self.ticket.capture is not None

    @property
    def changes(self) -> bool:
        """Whether other rules may select the tokens to come than that of the last pass."""
        return self.reads_tokens or self.varies

    def rules(self, positions: Ints, ids: Ints) -> NDArray[np.uint8]:
        """The rules that select the tokens `ids` at `positions`, which the trace has read."""
        selections = () if self.plan is None else self.plan.selections
        return rules_selecting(selections, positions, len(self.prompt), ids, self.trace)

    def selected_by(self, token: int) -> int:
        """The rules that select `token` at any position from `fixed_from` on."""
        found = self._selected_by.get(token)
        if found is None:
            position = np.array([self.fixed_from], dtype=np.int64)
            found = self._selected_by[token] = int(self.rules(position, np.array([token]))[0])
        return found


@dataclass(frozen=True)
class Record:
    """What a finished request leaves: all that its receipt is made from."""

    request: WorkerRequest
    ledger: PositionLedger
    """A ledger of one row."""


class WorkerRequests:
    """Assumes: called between forward passes, by one thread.

    Guarantees: a scheduled request always finds a slot (those of requests that wait in preemption
    are taken back first); rows and slots are free again when a request has ended, however it did.
    """

    def __init__(
        self,
        model: ModelInfo,
        tables_of: Callable[[Ticket, int], SlotTables[Any]],
        load: Callable[[str], SteeringPlan],
        *,
        rows: int,
        device: torch.device,
        inline: Callable[[SteeringPlan], bool],
        owns: Callable[[HookPoint], bool],
        collect: Callable[[], None] = lambda: None,
        drafts: int = 0,
        load_readouts: Callable[[str], ReadoutPlan] | None = None,
    ) -> None:
        """`tables_of` says which tables hold the plan of a request with this ticket, in a step
        that computes so many tokens of it and has room for it. `collect` is called before the
        ledger is read: passes may still report to it. `drafts` is the most drafted tokens that a
        pass computes for a request."""
        self._collect = collect
        self._model, self._tables_of = model, tables_of
        self._load, self._inline, self._owns = load, inline, owns
        self.ledger = PositionLedger(rows, model.max_length, device, drafts=drafts)
        self._free = list(range(rows - 1, -1, -1))
        self._running: dict[str, WorkerRequest] = {}
        self._records: OrderedDict[str, dict[int, Record]] = OrderedDict()
        self._ran_over: OrderedDict[str, None] = OrderedDict()
        self._load_readouts = load_readouts
        self._readouts: OrderedDict[str, dict[int, RequestReadouts | str]] = OrderedDict()
        """By ticket and choice what is read of a request, or why nothing is, until its front end
        says that it has all of it."""
        self._kept: OrderedDict[tuple[str, int], KeptStates] = OrderedDict()
        """In the same way the states that wait for their twin."""

    def __len__(self) -> int:
        return len(self._running)

    def get(self, req_id: str) -> WorkerRequest | None:
        return self._running.get(req_id)

    def admit(self, req_id: str, prompt: Sequence[int] | None, ticket: Ticket) -> None:
        """Takes in a request that vLLM schedules for the first time."""
        if req_id in self._running:
            self.retire(req_id)
        plan, fault = None, None
        tables = self._tables_of(ticket, 1)
        try:
            if prompt is None:
                raise EngineError("a prompt of embeddings has no tokens to steer")
            if ticket.plan is not None:
                plan = self._load(ticket.plan)
                tables.check(plan)
        except Exception as error:  # an exception here would end the engine for everybody
            plan, fault = None, str(error)
        ids = np.array(prompt if prompt is not None else (), dtype=np.int64)
        request = WorkerRequest(ticket, ids, plan, self._row(), tables, fault=fault)
        if plan is not None:
            # Inline constants go to one half of the stream: who measures or reads needs them apart.
            reads = ticket.capture is not None or ticket.readouts is not None
            apart = ticket.measure or reads
            # A plan without rules (every strength is 0) has nothing to do in the tables either.
            request.inline = not plan.rules or (not apart and self._inline(plan))
            bounds = [one.fixed_from(len(ids)) for one in ticket.selections]
            request.fixed_from = max(bounds, default=0)
            request.reads_tokens = ticket.reads_tokens
            request.varies = any(one.varies for one in plan.selections)
            request.trace = trace_of(plan.selections, ids, ticket.roles)
        if ticket.capture is not None:
            count = len(ticket.capture.positions)
            for point in filter(self._owns, ticket.capture.points):
                width = self._model.width(point.site)
                request.states[point] = torch.full((count, width), -float("inf"))
        if ticket.readouts is not None:
            request.readouts = self._read(ticket.readouts, len(ids), (ticket, req_id))
        if request.readouts is not None and request.readouts.plan.kl:
            request.kept = self._keep(len(ids), (ticket, req_id))
        self.ledger.reset(request.row)
        self._running[req_id] = request

    def resume(self, req_id: str, ticket: Ticket) -> bool:
        """Whether this is a request that runs already and was preempted: it keeps what it has.

        A preemption takes nothing but, where others need it, the slot.
        """
        request = self._running.get(req_id)
        return request is not None and request.ticket.key == ticket.key

    def retire(self, req_id: str) -> None:
        """Ends a request: its slot and row are free, its record waits to be fetched."""
        request = self._running.pop(req_id, None)
        if request is None:
            return
        self._free_slot(request)
        self._collect()
        leaves = request.ticket.plan is not None or request.ticket.capture is not None
        if leaves and not request.told:
            children = self._records.setdefault(request.ticket.key, {})
            children[_child(req_id, request.ticket)] = Record(request, self._row_of(request))
        self._free.append(request.row)
        while len(self._records) > _KEPT_RECORDS:
            self._records.popitem(last=False)

    def steered(
        self,
        request: WorkerRequest,
        tables: SlotTables[Any],
        scheduled: Callable[[], Iterable[WorkerRequest]],
    ) -> SteeredRequest:
        """What the coming pass knows of a request, whose plan has its slot in `tables` from now on;
        `scheduled` are all that keep theirs."""
        if request.plan is None:
            raise AssertionError("only steered requests have requests")
        if request.tables is not tables:
            self._free_slot(request)
            request.tables = tables
        if request.steered is None:
            if not request.tables.can_acquire(request.plan):
                kept = {id(other) for other in scheduled()}
                for other in self._running.values():
                    if id(other) not in kept:
                        self._free_slot(other)
            slot = request.tables.acquire(request.plan)
            request.steered = SteeredRequest(
                request.row,
                len(request.prompt),
                request.plan,
                slot,
                request.ticket.measure,
                request.trace,
            )
        return request.steered

    def records(self, key: str) -> dict[int, Record]:
        """Everything under a ticket's key that was not told yet, by choice: finished requests, and
        running ones as they are now."""
        self._collect()
        found = dict(self._records.get(key, {}))
        for req_id, request in self._running.items():
            if request.ticket.key == key and not request.told:
                found[_child(req_id, request.ticket)] = Record(request, self._row_of(request))
        return found

    def remember(self, record: Record, error: SteerError) -> None:
        """Takes note of a plan that ran over: what it left in the cache is not what it asks for."""
        if isinstance(error, NotFinite) and record.request.plan is not None:
            self._ran_over[record.request.plan.fingerprint] = None
            while len(self._ran_over) > _KEPT_RECORDS:
                self._ran_over.popitem(last=False)

    def check_cached(self, receipt: Receipt) -> None:
        """Raises `NotFinite` for steered states from the cache whose plan once ran over."""
        if receipt.tokens_cached and receipt.fingerprint in self._ran_over:
            raise not_finite("the cached states", steered=True)

    def read(self, key: str) -> Mapping[int, RequestReadouts | str]:
        """What is read of the requests under a ticket's key, by choice; in the place of one that
        could not be, why."""
        return self._readouts.get(key, {})

    def forget_readouts(self, key: str) -> None:
        """The front end has all that was read under `key`, or asks for none of it any more."""
        self._readouts.pop(key, None)

    def take_kept(self, key: str, choice: int) -> KeptStates | str | None:
        """The states that were kept of a choice, or why none were; then nothing that was read of
        it is left. None where this worker never ran it."""
        left = self._readouts.get(key, {})
        read = left.pop(choice, None)
        if not left:
            self.forget_readouts(key)
        return read if isinstance(read, str) else self._kept.pop((key, choice), None)

    def forget_kept(self, key: str) -> None:
        """Nobody will compare what was kept under `key`."""
        for mine in [one for one in self._kept if one[0] == key]:
            del self._kept[mine]

    def _read(
        self, order: ReadoutOrder, prompt_length: int, of: tuple[Ticket, str]
    ) -> RequestReadouts | None:
        found: RequestReadouts | str
        try:
            if self._load_readouts is None:
                raise EngineError("this worker reads nothing")
            plan = self._load_readouts(order.plan)
            found = RequestReadouts(plan, prompt_length, self._owns)
        except Exception as error:  # an exception here would end the engine for everybody
            found = str(error)
        ticket, req_id = of
        self._readouts.setdefault(ticket.key, {})[_child(req_id, ticket)] = found
        while len(self._readouts) > _KEPT_RECORDS:
            self._readouts.popitem(last=False)
        return found if isinstance(found, RequestReadouts) else None

    def _keep(self, prompt_length: int, of: tuple[Ticket, str]) -> KeptStates:
        ticket, req_id = of
        kept = KeptStates(self._model, prompt_length, self._owns)
        self._kept[ticket.key, _child(req_id, ticket)] = kept
        while len(self._kept) > _KEPT_RECORDS:
            self._kept.popitem(last=False)
        return kept

    def forget(self, key: str) -> None:
        """Drops what requests left under `key`; those that have yet to end leave nothing there."""
        self._records.pop(key, None)
        for request in self._running.values():
            request.told |= request.ticket.key == key

    def _row(self) -> int:
        if not self._free:
            rows = len(self.ledger.applied)
            self.ledger.grow()
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def _free_slot(self, request: WorkerRequest) -> None:
        if request.steered is not None and request.plan is not None:
            request.tables.release(request.plan)
            request.steered = None

    def _row_of(self, request: WorkerRequest) -> PositionLedger:
        return self.ledger.row(request.row, len(request.prompt))


def receipt(record: Record, fed: int) -> Receipt:
    """The receipt of a request that fed `fed` tokens. Raises `EngineError` where its plan could
    not be carried out, or where a token that it fed was neither computed nor cached; `NotFinite`
    where its numbers ran over."""
    request, ledger = record.request, record.ledger
    if request.fault is not None or request.plan is None:
        raise EngineError(
            f"the request was not steered, so its answer is withheld: {request.fault}",
            code="not_steered",
        )
    ledger.settle(np.zeros(1, dtype=np.int64), np.array([fed]))
    if ledger.runs_over(0, fed):
        raise not_finite("the states or logits", steered=True)
    bits = ledger.applied[0, :fed].astype(np.int64)
    cached = bits == UNSEEN
    bits &= RULES
    unseen = int(cached.sum())
    if cached[len(request.prompt) :].any() or len(bits) < fed:
        raise EngineError(
            "the forward passes that steered this request were not all seen, so its answer is "
            "withheld",
            code="steps_missed",
        )
    selected = _cached_rules(request, np.flatnonzero(cached)) if unseen else np.zeros(0, dtype=int)
    bits[cached] = selected
    counts = np.bincount(bits, minlength=ledger.tokens.shape[1])
    steered = SteeredRequest(0, len(request.prompt), request.plan, 0, request.ticket.measure)
    found = receipt_of(
        steered,
        request.plan,
        ledger,
        counts,
        fed,
        shares=shares_of(steered, np.arange(fed), bits),
        cached=int((selected != 0).sum()),
    )
    if not ledger.drafts:
        return found
    speculation = SpeculationReceipt(int(ledger.drafted[0]), ledger.accepted(0, fed))
    return replace(found, speculation=speculation)


def _cached_rules(request: WorkerRequest, positions: Ints) -> Ints:
    """The rules that shaped cached tokens. A gate on single tokens was decided when the cached
    state was made and is not known here: its rule counts as closed."""
    bits = request.rules(positions, request.prompt[positions]).astype(np.int64)
    for number, one in enumerate(request.plan.rules if request.plan is not None else ()):
        if one.gate is not None:
            bits &= ~(1 << number)
    return bits


def _child(req_id: str, ticket: Ticket) -> int:
    """Which of n choices a request is: vLLM puts its number in front of the parent's id."""
    if ticket.n == 1:
        return 0
    number = req_id.split("_", 1)[0]
    return int(number) if number.isdigit() else 0
