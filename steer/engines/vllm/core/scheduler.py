"""vLLM's schedulers, made to wait for edit rows.

Workers hold the rank-1 edits of all running plans in tables of a fixed size. A request whose plan
does not fit beside those that run stays in vLLM's own queue, as a request does whose grammar is
still being compiled: it is counted, aborted, prioritised and paused like any waiting request.
While it waits, requests without edit rows pass it, and no other request for rows does, so that it
is not overtaken forever. A preempted request keeps its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from steer.engines.vllm.core.attached import AttachedReceipts
from steer.engines.vllm.core.attached_readouts import AttachedReadouts
from steer.engines.vllm.core.cache_keys import assert_forked, ticket_of
from steer.engines.vllm.internals import SCHEDULER
from steer.engines.vllm.options import SteerOptions
from steer.engines.vllm.seams import check
from steer.errors import EngineError, Unsupported


@dataclass
class RowBudget:
    """Which requests have a claim on the `capacity` edit rows; a plan's rows are counted once.

    Assumes: between two calls of `new_round`, requests are presented in the order in which they
    are to be served.
    Guarantees: the claims never exceed `capacity`; of those that wait for rows, none gets them
    before one that was presented earlier; a claim ends with `release` alone.
    """

    capacity: int
    used: int = 0
    _holders: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    _claims: dict[str, tuple[str, int]] = field(default_factory=dict)
    _someone_waits: bool = False

    def new_round(self) -> None:
        self._someone_waits = False

    def admit(self, request_id: str, fingerprint: str, rows: int) -> bool:
        """Whether the request may run now; claims its rows if so."""
        if rows <= 0 or request_id in self._claims:
            return True
        plan = (fingerprint, rows)
        new = 0 if plan in self._holders else rows
        if self._someone_waits or self.used + new > self.capacity:
            self._someone_waits = True
            return False
        self.used += new
        self._holders.setdefault(plan, set()).add(request_id)
        self._claims[request_id] = plan
        return True

    def release(self, request_id: str) -> None:
        """Ends the request's claim; does nothing where it has none."""
        plan = self._claims.pop(request_id, None)
        if plan is None:
            return
        holders = self._holders[plan]
        holders.discard(request_id)
        if not holders:
            del self._holders[plan]
            self.used -= plan[1]


class _WaitsForRows(Scheduler):  # type: ignore[misc]  # vLLM comes without types
    """Holds back requests in `_handle_blocked_waiting_request`, which vLLM asks about each."""

    def __init__(self, *args: Any, **named: Any) -> None:
        from steer.engines.vllm.seams import assert_checked  # noqa: PLC0415

        # vLLM only logs a plugin that fails to load; here, in the engine core, it fails closed.
        assert_forked()
        assert_checked()
        check(*SCHEDULER)
        super().__init__(*args, **named)
        self.edit_rows = RowBudget(SteerOptions.of(self.vllm_config.additional_config).edit_rows)
        self.receipts, self.readouts = AttachedReceipts(), AttachedReadouts()

    def add_request(self, request: Any) -> None:
        self.readouts.follow(request)
        super().add_request(request)

    def schedule(self, *args: Any, **named: Any) -> Any:
        self.edit_rows.new_round()
        return super().schedule(*args, **named)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        if not super()._handle_blocked_waiting_request(request):
            return False
        ticket = ticket_of(request)
        if ticket is None:
            return True
        return self.edit_rows.admit(request.request_id, ticket.fingerprint, ticket.rows)

    def _free_request(self, request: Any, *args: Any, **named: Any) -> Any:
        # The next scheduler output tells the workers of the end of this request together with
        # those it makes room for, and they take ends first.
        self.edit_rows.release(request.request_id)
        self.receipts.note(request)
        self.readouts.note(request)
        return super()._free_request(request, *args, **named)

    def update_from_output(self, *args: Any, **named: Any) -> Any:
        outputs = super().update_from_output(*args, **named)
        self.receipts.attach(outputs)
        self.readouts.attach(outputs)
        return outputs


class SteerScheduler(_WaitsForRows):
    """vLLM's scheduler, waiting for edit rows."""


class SteerAsyncScheduler(_WaitsForRows, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler, waiting for edit rows."""


_SUBCLASSES: dict[type, type] = {Scheduler: SteerScheduler, AsyncScheduler: SteerAsyncScheduler}
_NAMES = frozenset(f"{one.__module__}.{one.__qualname__}" for one in _SUBCLASSES.values())


def scheduler_name(scheduler_config: Any) -> str:
    """The qualified name for `scheduler_cls`: the subclass of what vLLM would have used.

    Call it when `async_scheduling` has been decided. Raises `Unsupported` for other schedulers.
    """
    if scheduler_config.async_scheduling is None:
        raise EngineError("vLLM has not decided yet whether it schedules asynchronously")
    chosen = scheduler_config.get_scheduler_cls()
    if issubclass(chosen, _WaitsForRows):
        return f"{chosen.__module__}.{chosen.__qualname__}"
    subclass = _SUBCLASSES.get(chosen)
    if subclass is None:
        raise Unsupported(
            f"the scheduler {chosen.__module__}.{chosen.__qualname__} cannot be made to wait for "
            "edit rows: start vLLM without scheduler_cls",
            code="unsupported_scheduler",
        )
    check(*SCHEDULER)
    return f"{subclass.__module__}.{subclass.__qualname__}"


def holds_back(scheduler_config: Any) -> bool:
    """Whether requests of an engine with this configuration wait for edit rows."""
    chosen = scheduler_config.scheduler_cls
    if isinstance(chosen, str):
        return chosen in _NAMES
    return isinstance(chosen, type) and issubclass(chosen, _WaitsForRows)
