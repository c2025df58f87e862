"""Whether a ticket tells the truth about its plan, found before the request is scheduled.

What a worker would refuse must be refused here: a worker cannot fail one request alone, and states
that it computed unsteered would lie in the cache under the plan's name.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from steer.engines.vllm.desk import budget_rows
from steer.engines.vllm.options import SteerOptions, is_static, registry_location
from steer.engines.vllm.ticket import Ticket
from steer.errors import SpecError, Unsupported
from steer.plan import check_passes
from steer.plan_file import load_plan
from steer.positions import Selection
from steer.registry.plan_store import PlanStore
from steer.tables import MAX_PASSES

_REMEMBERED = 4096


class _Facts(NamedTuple):
    fingerprint: str
    rows: int
    selections: tuple[Selection, ...]
    competes: bool


class Examination:
    """Compares tickets with the plans that they name. Safe from any thread."""

    def __init__(self) -> None:
        self._store: PlanStore | None = None
        self._known: OrderedDict[str, _Facts] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, ticket: Ticket, config: Any) -> None:
        """Raises a `SteerError` for a plan that is missing, damaged or another than claimed."""
        if ticket.plan is None:
            return
        facts = self._facts(ticket.plan)
        if facts[:3] != (ticket.fingerprint, ticket.rows, ticket.selections):
            raise SpecError(
                "the ticket says something else than the plan that it names: send the spec in the "
                "field 'steering' instead",
                code="invalid_ticket",
            )
        if facts.competes and is_static(config, SteerOptions.of(config.additional_config)):
            raise Unsupported(
                "clamping a TopK SAE reads every latent of the SAE, which cannot be done inside "
                "CUDA graphs: start vLLM with --enforce-eager, or clamp an SAE with fixed "
                "thresholds",
                code="unsupported_sae",
                param="/interventions",
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
        blocks = [block for one in loaded.passes for block in one.blocks.values()]
        competes = any(block.competition is not None for block in blocks)
        facts = _Facts(loaded.fingerprint, budget_rows(loaded), selections, competes)
        with self._lock:
            self._known[plan] = facts
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return facts
