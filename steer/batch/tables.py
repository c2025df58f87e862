"""Many plans in static tables: what a batch of differently steered tokens is computed from.

Every plan that runs holds one *slot* (a small integer; 0 is "do nothing"), shared by fingerprint
and counted by reference. For each hook point and rule there is a `Table`: a row of constants per
slot, and a bank of rank-1 edits in which every row knows its owner. A token then needs one slot
number per rule, whatever the number of distinct specs around it.

S slots, M bank rows, d the width of the hook point, P rules, R request rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steer.batch.encoders import DeviceEncoders
from steer.batch.slots import Holding, SlotTables
from steer.edits import Block, Encoder, EncoderUse
from steer.errors import CapacityError
from steer.laws import LAW_FIELDS, NO_TRAIT, LawColumns, Traits
from steer.model import HookPoint, ModelInfo, forward_order
from steer.plan.plan import Gate, SteeringPlan, check_rules

MAX_RULES = 8
_FIRST_BANK_ROWS = 16
_KEPT_PARTS = 4
_COMPACT = 0.5
"""Up to this share of a bank, a batch's edits are copied out of it."""


class Needs(NamedTuple):
    """What a batch's blocks do at a table beyond adding constants."""

    edits: bool = True
    replacing: bool = True
    preserving: bool = True
    mapping: bool = True
    choosing: bool = True


class SlotRows:
    """What few slots have, a row each: `idle` is what the others have."""

    def __init__(self, idle: Tensor, slots: int) -> None:
        self._rows = idle[None]
        self._row = torch.zeros(slots, dtype=torch.long, device=idle.device)
        self._held: dict[int, int] = {}

    def of(self, slots: Tensor) -> Tensor:
        """The rows `[T, ...]` of `slots` `[T]`."""
        return self._rows.index_select(0, self._row.index_select(0, slots))

    def write(self, slot: int, row: Tensor) -> None:
        """Makes `row` that of `slot`, which had none."""
        taken = set(self._held.values())
        place = next(n for n in range(1, len(taken) + 2) if n not in taken)
        if place == len(self._rows):
            self._rows = torch.cat([self._rows, self._rows[:1].expand_as(self._rows)])
        self._rows[place] = row.to(self._rows.device)
        self._row[slot] = self._held[slot] = place

    def clear(self, slot: int) -> None:
        if self._held.pop(slot, None) is not None:
            self._row[slot] = 0


@dataclass(frozen=True)
class TableView:
    """A table as far as some slots need it: constants and flags by slot `[S + 1, ...]`, and a bank
    of K edits, in which every row knows its slot. All of them read at `reads_at`, or here."""

    shift: Tensor
    replace: Tensor
    preserve: Tensor
    channels: SlotRows
    sides: SlotRows
    read: Tensor
    write: Tensor
    laws: LawColumns
    owner: Tensor
    encoders: tuple[EncoderUse, ...]
    reads_at: HookPoint | None
    needs: Needs
    shifting: bool
    """Whether any of these slots adds a constant."""


class Table:
    """One rule at one hook point, for every slot.

    Guarantees: row 0 of `shift` is −0.0, so that x + shift[0] is x to the bit; bank rows that are
    free have owner −1 and zero weights.
    """

    def __init__(self, slots: int, width: int, encoders: DeviceEncoders) -> None:
        device = encoders.device
        self.device, self.width, self._on_device = device, width, encoders
        self.shift = torch.full((slots, width), -0.0, device=device)
        self.replace = torch.zeros(slots, dtype=torch.bool, device=device)
        self.preserve = torch.zeros(slots, dtype=torch.bool, device=device)
        self.channels = SlotRows(_no_channels(width, device), slots)
        self.sides = SlotRows(torch.zeros(width, device=device), slots)
        self.read = torch.zeros(0, width, device=device)
        self.write = torch.zeros(0, width, device=device)
        self.laws = torch.zeros(0, LAW_FIELDS, device=device)
        self.owner = torch.zeros(0, dtype=torch.long, device=device)
        self.encoder = torch.zeros(0, dtype=torch.long, device=device)
        """The number of the encoder that each bank row asks, 0 for none; and its column there."""
        self.column = torch.zeros(0, dtype=torch.long, device=device)
        self.encoders: dict[str, tuple[int, Encoder]] = {}
        self.blocks: dict[int, Block] = {}
        self.bank_rows = 0
        self._owned: dict[int, list[int]] = {}
        self._views: OrderedDict[frozenset[int], TableView] = OrderedDict()

    def groups(self, slots: set[int]) -> list[set[int]]:
        """The slots among `slots` with a block here, in groups that share a view: apart are those
        that read at another point, and those with an encoder, which is asked about each token that
        it is shown."""
        found: dict[tuple[bool, HookPoint | None], set[int]] = {}
        for slot in sorted(slots & self.blocks.keys()):
            block = self.blocks[slot]
            key = (block.encoder is not None, block.reads_at)
            found.setdefault(key, set()).add(slot)
        return [found[key] for key in sorted(found, key=_plain_first)]

    def view(self, slots: Iterable[int]) -> TableView:
        """What `slots`, of one group or of all that read here, make necessary, whatever others
        hold."""
        key = frozenset(slots)
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = self._view(key)
            while len(self._views) > _KEPT_PARTS:
                self._views.popitem(last=False)
        return found

    def _view(self, slots: frozenset[int]) -> TableView:
        rows = sorted(row for slot in slots for row in self._owned.get(slot, ()))
        # Others' edits are computed and thrown away where that is cheaper than to leave them out.
        compact = len(rows) <= _COMPACT * self.bank_rows
        chosen: slice | Tensor = slice(self.bank_rows)
        if compact:
            chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        traits = reduce(Traits.either, (self.blocks[slot].traits for slot in slots), NO_TRAIT)
        return TableView(
            self.shift,
            self.replace,
            self.preserve,
            self.channels,
            self.sides,
            self.read[chosen],
            self.write[chosen],
            LawColumns.of(self.laws[chosen], traits),
            self.owner[chosen],
            self._uses(slots, chosen),
            next((self.blocks[slot].reads_at for slot in slots), None),
            self.needs(slots),
            any(self.blocks[slot].shift is not None for slot in slots),
        )

    def _uses(self, slots: Iterable[int], chosen: slice | Tensor) -> tuple[EncoderUse, ...]:
        """The encoders that the blocks of `slots` ask, and where in the bank rows `chosen`."""
        encoders = [self.blocks[slot].encoder for slot in sorted(slots)]
        asked = dict.fromkeys(one.identity for one in encoders if one is not None)
        mine, columns = self.encoder[chosen], self.column[chosen]
        found = []
        for number, encoder in (self.encoders[identity] for identity in asked):
            rows = (mine == number).nonzero()[:, 0]
            found.append(EncoderUse(encoder, rows, columns[rows]))
        return tuple(found)

    def needs(self, slots: Iterable[int]) -> Needs:
        """What the blocks of `slots` make necessary, whatever idle slots hold."""
        blocks = [self.blocks[slot] for slot in slots]
        return Needs(
            edits=any(block.n_edits for block in blocks),
            replacing=any(block.replace for block in blocks),
            preserving=any(block.preserve_norm for block in blocks),
            mapping=any(block.channels is not None for block in blocks),
            choosing=any(block.side is not None for block in blocks),
        )

    def write_block(self, slot: int, block: Block) -> None:
        """Makes `slot` mean `block`; the slot was free."""
        self.blocks[slot] = block
        if block.shift is not None:
            self.shift[slot] = block.shift.to(self.device)
        self.replace[slot] = block.replace
        self.preserve[slot] = block.preserve_norm
        if block.channels is not None:
            self.channels.write(slot, block.channels)
        if block.side is not None:
            self.sides.write(slot, block.side)
        if block.read is not None and block.write is not None and block.laws is not None:
            rows = self._free_rows(block.n_edits)
            self._owned[slot] = rows
            self.read[rows] = block.read.to(self.device)
            self.write[rows] = block.write.to(self.device)
            self.laws[rows] = block.laws.to(self.device)
            self.owner[rows] = slot
            if block.encoder is not None:
                self.encoder[rows] = self._enter(block.encoder)
                self.column[rows] = torch.tensor(block.columns, device=self.device)
        self._refresh()

    def clear(self, slot: int) -> None:
        """Makes `slot` mean nothing again."""
        self.blocks.pop(slot, None)
        self.shift[slot] = -0.0
        self.replace[slot] = False
        self.preserve[slot] = False
        self.channels.clear(slot)
        self.sides.clear(slot)
        rows = self._owned.pop(slot, [])
        if rows:
            self.read[rows] = 0.0
            self.write[rows] = 0.0
            self.laws[rows] = 0.0
            self.owner[rows] = -1
            self.encoder[rows] = self.column[rows] = 0
        if all(block.encoder is None for block in self.blocks.values()):
            self.encoders.clear()
        self._refresh()

    def _refresh(self) -> None:
        self._views.clear()
        self.bank_rows = 1 + max((max(rows) for rows in self._owned.values()), default=-1)

    def _enter(self, encoder: Encoder) -> int:
        """The number of `encoder` in this table."""
        if encoder.identity not in self.encoders:
            number = len(self.encoders) + 1
            self.encoders[encoder.identity] = (number, self._on_device.of(encoder))
        return self.encoders[encoder.identity][0]

    def _free_rows(self, count: int) -> list[int]:
        taken = {row for rows in self._owned.values() for row in rows}
        free = [row for row in range(len(self.owner)) if row not in taken][:count]
        if len(free) < count:
            self._grow(max(_FIRST_BANK_ROWS, 2 * len(self.owner), len(taken) + count))
            return self._free_rows(count)
        return free

    def _grow(self, rows: int) -> None:
        extra = rows - len(self.owner)
        self.read = torch.cat([self.read, self.read.new_zeros(extra, self.width)])
        self.write = torch.cat([self.write, self.write.new_zeros(extra, self.width)])
        self.laws = torch.cat([self.laws, self.laws.new_zeros(extra, LAW_FIELDS)])
        self.owner = torch.cat([self.owner, self.owner.new_full((extra,), -1)])
        self.encoder = torch.cat([self.encoder, self.encoder.new_zeros(extra)])
        self.column = torch.cat([self.column, self.column.new_zeros(extra)])


def _plain_first(key: tuple[bool, HookPoint | None]) -> tuple[bool, tuple[int, int]]:
    asks, reads_at = key
    return asks, (-1, -1) if reads_at is None else forward_order(reads_at)


def _no_channels(width: int, device: torch.device) -> Tensor:
    """`channels` of a block that has none: no value lies inside their bounds."""
    infinity = float("inf")
    rows = torch.tensor([0.0, -0.0, infinity, -infinity], device=device)
    return rows[:, None].repeat(1, width)


HELD, EACH, ONWARD = 1, 2, 3
"""Kinds of gates: decided on the last prompt token and then held; decided by each token for itself;
open from the first token that finds it so."""


class GateTable:
    """The gates that read one hook point for one rule, a row per slot."""

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        self.direction = torch.zeros(slots, width, device=device)
        self.above = torch.full((slots,), float("inf"), device=device)
        self.below = torch.full((slots,), float("-inf"), device=device)
        self.bias = torch.zeros(slots, device=device)
        self.cosine = torch.zeros(slots, dtype=torch.bool, device=device)
        self.kinds = np.zeros(slots, dtype=np.int8)
        """Of each slot, on the host: `HELD`, `EACH`, `ONWARD`, or 0 where it has no gate here."""
        self.live: set[int] = set()
        self.elsewhere = False
        """Whether `point` lies on an earlier stage of a pipeline, which decides."""

    def write(self, slot: int, gate: Gate) -> None:
        self.direction[slot] = gate.direction.to(self.direction.device)
        self.above[slot], self.below[slot] = gate.above, gate.below
        self.cosine[slot], self.bias[slot] = gate.cosine, gate.bias
        self.kinds[slot] = HELD if gate.prompt_scope else ONWARD if gate.onward else EACH
        self.elsewhere = gate.elsewhere
        self.live.add(slot)

    def clear(self, slot: int) -> None:
        self.above[slot], self.below[slot] = float("inf"), float("-inf")
        self.kinds[slot] = 0
        self.live.discard(slot)


@dataclass
class _PlanHolding(Holding):
    plan: SteeringPlan = field(kw_only=True)


class Tables(SlotTables[_PlanHolding]):
    """Slots and their tables."""

    def __init__(
        self,
        model: ModelInfo,
        *,
        slots: int = 256,
        device: torch.device | str = "cpu",
        max_rules: int = MAX_RULES,
        encoders: DeviceEncoders | None = None,
    ) -> None:
        """`encoders` may be shared with other tables on `device`."""
        super().__init__(model, slots=slots, device=device, max_rules=max_rules)
        self._encoders = encoders or DeviceEncoders(self.device)
        self._by_point: dict[HookPoint, list[Table | None]] = {}
        self._gates: dict[HookPoint, list[GateTable | None]] = {}

    def check(self, plan: SteeringPlan) -> None:
        check_rules(len(plan.rules), self.max_rules)

    def at(self, point: HookPoint) -> list[Table | None]:
        """The tables at `point`, by rule; None where a rule has nothing there."""
        return self._by_point.get(point, [])

    def gates(self, point: HookPoint) -> list[GateTable | None]:
        """The gates that read `point`, by rule."""
        return self._gates.get(point, [])

    def points(self) -> set[HookPoint]:
        """Hook points at which some slot, in use or idle, edits or a gate reads."""
        edited = {p for p, row in self._by_point.items() if any(s and s.blocks for s in row)}
        return edited | {p for p, row in self._gates.items() if any(g and g.live for g in row)}

    def _take(self, plan: SteeringPlan) -> _PlanHolding:
        held = _PlanHolding(self._free_slot(), plan=plan)
        try:
            self._write(held.slot, plan)
        except Exception:
            self._clear(held.slot, plan)
            self._free.append(held.slot)
            raise
        return held

    def _free_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if not self._idle:
            raise CapacityError(
                f"all {self.slots} steering slots are in use by running requests: try again "
                "when one has finished, or start the server with more slots",
                code="slots_full",
            )
        _, oldest = self._idle.popitem(last=False)
        self._clear(oldest.slot, oldest.plan)
        return oldest.slot

    def _write(self, slot: int, plan: SteeringPlan) -> None:
        size = self.slots + 1
        for number, one in enumerate(plan.rules):
            for point, block in one.blocks.items():
                row = self._by_point.setdefault(point, [None] * self.max_rules)
                table = row[number]
                if table is None:
                    width = self.model.width(point.site)
                    table = row[number] = Table(size, width, self._encoders)
                table.write_block(slot, block)
            if one.gate is not None:
                gates = self._gates.setdefault(one.gate.point, [None] * self.max_rules)
                rows = gates[number]
                if rows is None:
                    width = self.model.width(one.gate.point.site)
                    rows = gates[number] = GateTable(size, width, self.device)
                rows.write(slot, one.gate)

    def _clear(self, slot: int, plan: SteeringPlan) -> None:
        for number, one in enumerate(plan.rules):
            for point in one.blocks:
                if (tables := self.at(point)) and (table := tables[number]) is not None:
                    table.clear(slot)
            if one.gate is not None:
                gates = self.gates(one.gate.point)
                if gates and (rows := gates[number]) is not None:
                    rows.clear(slot)
