"""Many plans in tables that never move: what a captured CUDA graph steers from.

A graph replays its kernels with the addresses they were captured with and runs no Python between
them. So everything that differs from step to step lies in tensors that are made once: the plans
(`StaticTables`, written when a plan takes a slot) and the batch (`StepBuffers`, written before each
rule). Nothing here is sized by what a batch contains.

The hook points that one kernel launch serves, in the order in which their edits run, are a *group*.

N hook points, G groups, S slots besides slot 0, P rules, B the most tokens in a batch, Q the most
requests in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from steer.artefacts.sae.encoders import TopKEncoder
from steer.batch.encoders import DeviceEncoders
from steer.batch.slots import Holding, SlotTables
from steer.batch.tables import MAX_RULES
from steer.engines.vllm.static.encoders import Encoders
from steer.engines.vllm.static.rows import BLOCK_FIELDS, ENCODER, KEPT, Bank, Rows, Taken, rows_of
from steer.errors import CapacityError, TooLarge, Unsupported
from steer.model import HookPoint, ModelInfo
from steer.plan.plan import Gate, Rule, SteeringPlan, check_rules

# Bits of `work`: from each on, one bit per rule.
EDITS, TOKEN_GATES, HELD_GATES, RANKS = 0, MAX_RULES, 2 * MAX_RULES, 3 * MAX_RULES
"""Rules with a block here; with a gate that reads each token here; with one that the last prompt
token decides here; with a block that ranks the latents of a TopK SAE."""

# Fields of a token's record; SELECTED also holds the marks.
SLOT, ROW, SELECTED, FOLLOWERS = range(4)
TOKEN_FIELDS = 4
DECIDES, FOLLOWS, MEASURED, RAMPED = (1 << MAX_RULES + n for n in range(4))
"""The token decides the gates that its request then holds; it comes after such a token in the same
pass; its request measures how large the edits are; its factors are to be looked up."""
NOT_EDITED = -1.0
"""Stands for the size of no edit."""


def own_gate(rule: Rule) -> Gate | None:
    """The gate of `rule` where a kernel of this worker decides it."""
    return None if rule.gate is None or rule.gate.elsewhere else rule.gate


@dataclass
class _StaticHolding(Holding):
    taken: dict[int, Taken] = field(kw_only=True)
    encoders: list[str] = field(kw_only=True)


class StaticTables(SlotTables[_StaticHolding]):
    """Slots and their tables, of a fixed size and at fixed addresses.

    Assumes: what `acquire` writes reaches the device in the order of the steps (one stream).
    """

    def __init__(
        self,
        model: ModelInfo,
        groups: Sequence[Sequence[HookPoint]],
        *,
        slots: int = 256,
        edit_rows: int = 4096,
        constant_rows: int | None = None,
        device: torch.device | str = "cpu",
        encoders: DeviceEncoders | None = None,
    ) -> None:
        """`encoders` may be shared with other tables on `device`."""
        super().__init__(model, slots=slots, device=device, max_rules=MAX_RULES)
        self.points = tuple(point for group in groups for point in group)
        self.first_points = tuple(int(n) for n in np.cumsum([0, *map(len, groups)]))
        self._group_of = {p: n for n, group in enumerate(groups) for p in group}
        self._index = {point: number for number, point in enumerate(self.points)}
        capacity = Rows(edit_rows, edit_rows if constant_rows is None else constant_rows)
        widths = {model.width(point.site) for point in self.points}
        self.banks = {width: Bank(width, capacity, self.device) for width in sorted(widths)}
        # A block that ranks latents has an edit: there are never more encoders than edit rows.
        encoders = encoders or DeviceEncoders(self.device)
        self.encoders = Encoders(edit_rows * len(self.banks), encoders)
        shape = (slots + 1, len(self.points))
        self.work = self._zeros(*shape)
        self.group_work = self._zeros(slots + 1, len(groups))
        self.blocks = self._zeros(*shape, MAX_RULES, BLOCK_FIELDS)
        self.readers = self._zeros(*shape, MAX_RULES)
        """For each rule 1 more than the number of the point whose block reads here; 0 for none."""
        self.gate_rows = self._zeros(slots + 1, MAX_RULES)

    @property
    def groups(self) -> int:
        return len(self.first_points) - 1

    def bank(self, group: int) -> Bank:
        """The rows for the hook points of `group`, which have one width."""
        return self.banks[self.model.width(self.points[self.first_points[group]].site)]

    def index(self, point: HookPoint) -> int:
        """The number of `point` in these tables."""
        return self._index[point]

    def groups_of(self, plan: SteeringPlan) -> frozenset[int]:
        """The groups in which `plan` edits or reads."""
        read = {gate.point for one in plan.rules if (gate := own_gate(one)) is not None}
        return frozenset(self._group_of[point] for point in {*plan.reached, *read})

    def check(self, plan: SteeringPlan) -> None:
        check_rules(len(plan.rules), self.max_rules)
        for one in plan.rules:
            gate = own_gate(one)
            points = [*one.touched, *([gate.point] if gate is not None else [])]
            for point in points:
                if point not in self._index:
                    raise Unsupported(
                        f"nothing can be steered at {point} inside CUDA graphs here: use one of "
                        f"{', '.join(map(str, self.points))}",
                        code="unsupported_site",
                    )
        for width, needed in self._rows(plan).items():
            capacity = self.banks[width].capacity
            if not needed.within(capacity):
                raise TooLarge(
                    f"this spec needs {needed.edits} edit rows and {needed.constants} constant "
                    f"rows; the engine has {capacity.edits} and {capacity.constants} for all "
                    "requests together: send fewer features or layers, or start the engine with "
                    "more edit_rows",
                    code="too_many_edit_rows",
                    param="/interventions",
                )

    def can_acquire(self, plan: SteeringPlan) -> bool:
        if plan.fingerprint in self._held or plan.fingerprint in self._idle:
            return True
        if not self._free and not self._idle:
            return False
        return all(
            needed.within(self._free_or_idle(width)) for width, needed in self._rows(plan).items()
        )

    def _rows(self, plan: SteeringPlan) -> dict[int, Rows]:
        """The rows that `plan` needs, by width."""
        found: dict[int, Rows] = {}

        def add(point: HookPoint, rows: Rows) -> None:
            width = self.model.width(point.site)
            found[width] = found.get(width, Rows()).plus(rows)

        for one in plan.rules:
            for point, block in one.blocks.items():
                add(point, rows_of(block))
            if (gate := own_gate(one)) is not None:
                add(gate.point, Rows(0, 1))
        return found

    def _free_or_idle(self, width: int) -> Rows:
        rows = self.banks[width].free
        for holding in self._idle.values():
            if width in holding.taken:
                rows = rows.plus(holding.taken[width].count)
        return rows

    def _take(self, plan: SteeringPlan) -> _StaticHolding:
        self._make_room(plan)
        return self._write(self._free.pop(), plan)

    def _make_room(self, plan: SteeringPlan) -> None:
        if not self.can_acquire(plan):
            full = "slots" if not self._free and not self._idle else "rows"
            raise CapacityError(
                f"the steering {full} that running requests leave free are too few "
                f"({self.slots - self.in_use} slots of {self.slots}, and of the rows "
                f"{ {w: tuple(self._free_or_idle(w)) for w in self.banks} }): try again when one "
                "has finished, or start the server with more",
                code=f"{full}_full",
            )
        needs = self._rows(plan)
        while not self._free or any(
            not needed.within(self.banks[width].free) for width, needed in needs.items()
        ):
            _, oldest = self._idle.popitem(last=False)
            self._clear(oldest)

    def _write(self, slot: int, plan: SteeringPlan) -> _StaticHolding:
        """Writes `plan` into `slot`: its rows, and then one copy for each table."""
        taken = {width: Taken() for width in self.banks}
        encoders: list[str] = []
        work = np.zeros(len(self.points), dtype=np.int64)
        group_work = np.zeros(self.groups, dtype=np.int64)
        blocks = np.zeros((len(self.points), MAX_RULES, BLOCK_FIELDS), dtype=np.int32)
        readers = np.zeros((len(self.points), MAX_RULES), dtype=np.int32)
        gate_rows = np.zeros(MAX_RULES, dtype=np.int32)
        kept = plan.ranked
        for number, one in enumerate(plan.rules):
            for point, block in one.blocks.items():
                width = self.model.width(point.site)
                index = self._index[point]
                blocks[index, number] = self.banks[width].write_block(block, taken[width])
                work[index] |= 1 << EDITS + number
                if isinstance(block.encoder, TopKEncoder):
                    blocks[index, number, ENCODER] = self.encoders.take(block.encoder)
                    encoders.append(block.encoder.identity)
                if block.reads_at is not None:
                    reading = self._index[block.reads_at]
                    readers[reading, number] = index + 1
                    group_work[self._group_of[block.reads_at]] |= 1 << EDITS + number
                    blocks[index, number, KEPT] = kept + 1
                    kept += block.kept
                elif block.encoder is not None:
                    work[index] |= 1 << RANKS + number
            if (gate := own_gate(one)) is not None:
                width = self.model.width(gate.point.site)
                gate_rows[number] = self.banks[width].write_gate(gate, taken[width])
                kind = HELD_GATES if gate.prompt_scope else TOKEN_GATES
                work[self._index[gate.point]] |= 1 << kind + number
        for point, index in self._index.items():
            group_work[self._group_of[point]] |= work[index]
        self.blocks[slot] = torch.from_numpy(blocks).to(self.device)
        self.readers[slot] = torch.from_numpy(readers).to(self.device)
        self.gate_rows[slot] = torch.from_numpy(gate_rows).to(self.device)
        # 32 bits, the highest of which is no sign.
        self.work[slot] = torch.from_numpy(work.astype(np.int32)).to(self.device)
        self.group_work[slot] = torch.from_numpy(group_work.astype(np.int32)).to(self.device)
        return _StaticHolding(slot, taken=taken, encoders=encoders)

    def _clear(self, holding: _StaticHolding) -> None:
        """Makes a slot mean nothing again; its rows are unreachable then."""
        self.group_work[holding.slot] = 0
        self.work[holding.slot] = 0
        for width, taken in holding.taken.items():
            self.banks[width].give_back(taken)
        for identity in holding.encoders:
            self.encoders.give_back(identity)
        self._free.append(holding.slot)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)


class StepBuffers:
    """What differs from one pass to the next. A token whose slot is 0 is left alone.

    `tokens` `[B, 4]` are records: slot, row among the requests of this rule, the rules that select
    the token with its marks, and on a deciding token how many tokens of its request follow it.
    `opened` `[B]` are the rules that act on a token, as bits: those of gates that are still closed
    are missing, and the kernel adds them as it decides. `factors` `[B, P]` multiply what they
    change in the tokens that are marked `RAMPED`. `held` `[Q]` are the gates' decisions that each
    request holds, as bits, with the values read `[Q, P]`. `sizes` `[N, B]` is ‖Δx‖/‖x‖ of each
    token that was edited where its request measures, and `NOT_EDITED` otherwise. `lost` `[B]` is 1
    where an edit would have driven a token beyond all numbers, and left it alone. `reached[g]` is
    set to `epoch` by every launch for group g.

    A token that ranks the latents of a TopK SAE, or keeps what it has read for edits behind, has
    room for them in `latents`, from `latents_at` `[B]` on; the programs that encode it together are
    counted in `arrived` `[B]`. `programs` is how many a launch may have in all, where that makes
    several for a token.
    """

    def __init__(
        self,
        tables: StaticTables,
        *,
        batch_tokens: int,
        requests: int,
        latents: int = 0,
        programs: int = 1,
    ) -> None:
        """Without room for `latents`, no plan may rank any."""
        device = tables.device
        self.batch_tokens, self.requests, self.programs = batch_tokens, requests, programs
        self.latents = torch.zeros(latents, device=device)
        self.latents_at = torch.zeros(batch_tokens, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(batch_tokens, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(batch_tokens, TOKEN_FIELDS, dtype=torch.int32, device=device)
        self.factors = torch.ones(batch_tokens, MAX_RULES, device=device)
        # One tensor, so that one copy brings back what a pass did.
        groups = tables.groups
        self.report = torch.zeros(groups + batch_tokens, dtype=torch.int32, device=device)
        self.reached, self.opened = self.report[:groups], self.report[groups:]
        self.epoch = torch.zeros(1, dtype=torch.int32, device=device)
        self.held = torch.zeros(requests, dtype=torch.int32, device=device)
        self.values = torch.full((requests, MAX_RULES), float("nan"), device=device)
        self.lost = torch.zeros(batch_tokens, dtype=torch.int32, device=device)
        self.sizes = torch.full((len(tables.points), batch_tokens), NOT_EDITED, device=device)
