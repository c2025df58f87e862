"""Whether a ticket tells the truth about its plan, found before the request is scheduled.

What a worker would refuse must be refused here: a worker cannot fail one request alone, and states
that it computed unsteered would lie in the cache under the plan's name.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from steer.engines.vllm.options import registry_location
from steer.engines.vllm.ticket import Ticket
from steer.errors import SpecError
from steer.plan import check_passes
from steer.plan_file import edit_rows, load_plan
from steer.positions import Selection
from steer.registry.plan_store import PlanStore
from steer.tables import MAX_PASSES

_REMEMBERED = 4096


class _Facts(NamedTuple):
    fingerprint: str
    rows: int
    selections: tuple[Selection, ...]


class Examination:
    """Compares tickets with the plans that they name. Safe from any thread."""

    def __init__(self) -> None:
        self._store: PlanStore | None = None
        self._known: OrderedDict[str, _Facts] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, ticket: Ticket, _: Any) -> None:
        """Raises a `SteerError` for a plan that is missing, damaged or another than claimed."""
        if ticket.plan is None:
            return
        facts = self._facts(ticket.plan)
        if facts != (ticket.fingerprint, ticket.rows, ticket.selections):
            raise SpecError(
                "the ticket says something else than the plan that it names: send the spec in the "
                "field 'steering' instead",
                code="invalid_ticket",
            )

    def _facts(self, plan: str) -> _Facts:
        with self._lock:
            known = self._known.get(plan)
            if known is not None:
                self._known.move_to_end(plan)
                return known
            store = self._store = self._store or PlanStore(registry_location())
        loaded = load_plan(store.get(plan), store.sae_encoder)
        check_passes(len(loaded.passes), MAX_PASSES)
        selections = tuple(one.selection for one in loaded.passes)
        facts = _Facts(loaded.fingerprint, edit_rows(loaded), selections)
        with self._lock:
            self._known[plan] = facts
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return facts
