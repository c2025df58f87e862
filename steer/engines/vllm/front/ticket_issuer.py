"""Makes tickets in a front end: the plan goes to the store once, the request names it."""

from __future__ import annotations

import json
import threading
import uuid
from collections import OrderedDict

from steer.engines.vllm.static.rows import budget_rows
from steer.engines.vllm.ticket import CaptureOrder, ReadoutOrder, Ticket
from steer.plan.file import dump_plan
from steer.plan.plan import SteeringPlan
from steer.prompts.roles import RoleRanges
from steer.readouts.file import dump_readouts
from steer.readouts.plan import ReadoutPlan
from steer.registry.blobs.plan_store import PlanStore

_REMEMBERED = 4096


class TicketIssuer:
    """Makes the tickets of one front end.

    Assumes: every worker reads the same store. Safe from any thread.
    """

    def __init__(self, store: PlanStore) -> None:
        self._store = store
        self._published: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._lock = threading.Lock()

    def issue(
        self,
        plan: SteeringPlan | None,
        *,
        n: int = 1,
        measure: bool = False,
        attached: bool = False,
        capture: CaptureOrder | None = None,
        roles: RoleRanges | None = None,
        readouts: ReadoutPlan | None = None,
        arriving: bool = False,
    ) -> Ticket:
        """A ticket with a key of its own for one request of `n` choices; `roles` say whose words
        its prompt is, where the plan asks. With `attached` the receipt comes on the engine's last
        output, with `arriving` what was read on each."""
        key = uuid.uuid4().hex
        order = None
        if readouts is not None:
            sha256 = self._store.put(dump_readouts(readouts))
            order = ReadoutOrder(sha256, readouts.reads_prompt, arriving)
        if plan is None:
            return Ticket(key, n, capture=capture, readouts=order)
        sha256, rows = self._publish(plan)
        return Ticket(
            key,
            n,
            fingerprint=plan.fingerprint,
            plan=sha256,
            rows=rows,
            selections=plan.selections,
            measure=measure,
            attached=attached,
            latents=plan.latents,
            roles=roles if plan.reads_roles else None,
            graphless=plan.graphless,
            onward=plan.onward,
            pooled=plan.pooled,
            capture=capture,
            readouts=order,
        )

    def holds(self, plan: SteeringPlan) -> bool:
        """Whether `issue` has nothing to write for `plan`."""
        with self._lock:
            return _name(plan) in self._published

    def _publish(self, plan: SteeringPlan) -> tuple[str, int]:
        name = _name(plan)
        with self._lock:
            known = self._published.get(name)
            if known is not None:
                self._published.move_to_end(name)
        if known is None:
            known = (self._store.put(dump_plan(plan)), budget_rows(plan))
            with self._lock:
                self._published[name] = known
                while len(self._published) > _REMEMBERED:
                    self._published.popitem(last=False)
        return known


def _name(plan: SteeringPlan) -> str:
    # Strengths that were asked for in other words mean the same, but the receipt, which is made
    # from the file, tells them apart.
    asked = plan.resolved_strengths
    return f"{plan.fingerprint} {json.dumps(asked)}" if asked else plan.fingerprint
