"""Whether a ticket tells the truth about its plan, found before the request is scheduled.

What a worker would refuse must be refused here: a worker cannot fail one request alone, and states
that it computed unsteered would lie in the cache under the plan's name.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from steer.batch.tables import MAX_PASSES
from steer.engines.vllm.front.desk import budget_rows
from steer.engines.vllm.options import SteerOptions, is_static, registry_location
from steer.engines.vllm.static.tables import no_competition
from steer.engines.vllm.ticket import Ticket
from steer.errors import SpecError
from steer.plan.file import load_plan
from steer.plan.plan import check_passes
from steer.plan.selection import Selection
from steer.registry.blobs.plan_store import PlanStore

_REMEMBERED = 4096


class _Facts(NamedTuple):
    fingerprint: str
    rows: int
    selections: tuple[Selection, ...]
    competes: bool


class Examination:
    """Compares tickets with the plans that they name. Safe from any thread."""

    def __init__(self) -> None:
        self._facts = lru_cache(_REMEMBERED)(self._look)

    @cached_property
    def _store(self) -> PlanStore:
        return PlanStore(registry_location())

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
            raise no_competition()

    def _look(self, plan: str) -> _Facts:
        loaded = load_plan(self._store.get(plan), self._store.sae_encoder)
        check_passes(len(loaded.passes), MAX_PASSES)
        selections = tuple(one.selection for one in loaded.passes)
        blocks = [block for one in loaded.passes for block in one.blocks.values()]
        competes = any(block.competition is not None for block in blocks)
        return _Facts(loaded.fingerprint, budget_rows(loaded), selections, competes)
