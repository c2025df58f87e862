"""Which plan holds which slot: shared by fingerprint, counted by reference, oldest reused first.

What a slot means in tensors is the tables' own (`tables.py`; on vLLM also `static/tables.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from steer.model import ModelInfo
from steer.plan.plan import SteeringPlan


@dataclass
class Holding:
    """A slot that means something; tables keep beside it what they need to clear it."""

    slot: int
    references: int = 0


H = TypeVar("H", bound=Holding)


class SlotTables(ABC, Generic[H]):
    """Tables with slots 1 to `slots`; slot 0 does nothing.

    Assumes: `acquire` and `release` are called between steps, by one thread.
    Guarantees: equal fingerprints share a slot; a slot in use is never rewritten; the tables of a
    released slot are kept until another plan needs the place (least recently used first);
    `CapacityError` when what is in use leaves no place.
    """

    def __init__(
        self, model: ModelInfo, *, slots: int, device: torch.device | str, max_rules: int
    ) -> None:
        self.model, self.slots, self.device = model, slots, torch.device(device)
        self.max_rules = max_rules
        self._held: dict[str, H] = {}
        self._idle: OrderedDict[str, H] = OrderedDict()
        self._free = list(range(slots, 0, -1))

    @property
    def in_use(self) -> int:
        """Slots that a running request refers to."""
        return len(self._held)

    @abstractmethod
    def check(self, plan: SteeringPlan) -> None:
        """Raises where no table of this shape could ever hold `plan`."""

    def acquire(self, plan: SteeringPlan) -> int:
        """The slot of `plan`, written if it is new; release it as often as it was acquired."""
        self.check(plan)
        held = self._held.get(plan.fingerprint) or self._idle.pop(plan.fingerprint, None)
        if held is None:
            held = self._take(plan)
        held.references += 1
        self._held[plan.fingerprint] = held
        return held.slot

    def release(self, plan: SteeringPlan) -> None:
        """Gives back one reference; the last one makes the slot reusable."""
        held = self._held[plan.fingerprint]
        held.references -= 1
        if held.references == 0:
            del self._held[plan.fingerprint]
            self._idle[plan.fingerprint] = held

    def can_acquire(self, plan: SteeringPlan) -> bool:
        """Whether `acquire` would find a place now."""
        known = plan.fingerprint in self._held or plan.fingerprint in self._idle
        return known or bool(self._free) or bool(self._idle)

    @abstractmethod
    def _take(self, plan: SteeringPlan) -> H:
        """Writes `plan` into a free slot, emptying idle ones where that makes room."""
