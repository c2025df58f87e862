"""Rows of one width for the edits of many plans, in tensors that never move.

Every plan's rank-1 edits, constants and gates lie in rows of a `Bank`; what a block does is a
record that names its rows. R edit rows and C constant rows of width d besides row 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from steer.edits import LAW_FIELDS, RELATIVE, Block
from steer.engines.vllm.taps.shifts import only_shifts
from steer.plan.file import edit_rows
from steer.plan.plan import Gate, SteeringPlan

# Fields of a block's record, and the bits of its flags.
FIRST, COUNT, CONSTANT, FLAGS = range(4)
BLOCK_FIELDS = 4
REPLACES, PRESERVES, NEEDS_NORM = 1, 2, 4

# Fields of a gate.
ABOVE, BELOW, COSINE = range(3)
GATE_FIELDS = 4
LAW_STRIDE = LAW_FIELDS + 1
"""Laws and gates are padded to a power of two, so that their rows are aligned."""


class Rows(NamedTuple):
    """Rows of one width: rank-1 edits, and constants (shifts, replacements, gates' directions)."""

    edits: int = 0
    constants: int = 0

    def plus(self, other: Rows) -> Rows:
        return Rows(self.edits + other.edits, self.constants + other.constants)

    def within(self, other: Rows) -> bool:
        return self.edits <= other.edits and self.constants <= other.constants


def rows_needed(plan: SteeringPlan) -> int:
    """The part of the row budget that `plan` takes: its edits or its constants, if those are more.

    With as many constant rows as edit rows, plans whose sum is within the budget always fit.
    """
    blocks = [block for one in plan.rules for block in one.blocks.values()]
    gates = sum(one.gate is not None for one in plan.rules)
    constants = gates + sum(block.shift is not None for block in blocks)
    return max(edit_rows(plan), constants)


class Bank:
    """The rows of one width. Row 0 of everything is zero and belongs to nobody.

    The edits of one block are a chain: `following[row]` is the next, so that free rows need not
    lie together.
    """

    def __init__(self, width: int, capacity: Rows, device: torch.device) -> None:
        edits, constants = capacity.edits + 1, capacity.constants + 1
        self.width, self.capacity = width, capacity
        self.read = torch.zeros(edits, width, device=device)
        self.write = torch.zeros(edits, width, device=device)
        self.laws = torch.zeros(edits, LAW_STRIDE, device=device)
        self.following = torch.zeros(edits, dtype=torch.int32, device=device)
        self.constants = torch.zeros(constants, width, device=device)
        self.gates = torch.zeros(constants, GATE_FIELDS, device=device)
        self._free_edits = list(range(capacity.edits, 0, -1))
        self._free_constants = list(range(capacity.constants, 0, -1))

    @property
    def free(self) -> Rows:
        return Rows(len(self._free_edits), len(self._free_constants))

    def write_block(self, block: Block, taken: Taken) -> NDArray[np.int32]:
        """Puts `block` into free rows, which are added to `taken`; its record `[4]`."""
        record = np.zeros(BLOCK_FIELDS, dtype=np.int32)
        flags = REPLACES * block.replace | PRESERVES * block.preserve_norm
        needs_norm = block.preserve_norm
        if block.shift is not None:
            record[CONSTANT] = row = self._take_constant(taken)
            self.constants[row] = block.shift.to(self.constants)
        if block.read is not None and block.write is not None and block.laws is not None:
            rows = [self._free_edits.pop() for _ in range(block.n_edits)]
            taken.edits += rows
            index = torch.tensor(rows, device=self.read.device)
            self.read[index] = block.read.to(self.read)
            self.write[index] = block.write.to(self.write)
            self.laws[index, :LAW_FIELDS] = block.laws.to(self.laws)
            self.following[index] = torch.tensor([*rows[1:], 0], dtype=torch.int32).to(index.device)
            record[FIRST], record[COUNT] = rows[0], len(rows)
            needs_norm |= bool((block.laws[:, RELATIVE] > 0).any())
        record[FLAGS] = flags | NEEDS_NORM * needs_norm
        return record

    def write_gate(self, gate: Gate, taken: Taken) -> int:
        """Puts `gate` into a free constant row, which is added to `taken`."""
        row = self._take_constant(taken)
        self.constants[row] = gate.direction.to(self.constants)
        law = torch.tensor([gate.above, gate.below, float(gate.cosine), 0.0])
        self.gates[row] = law.to(self.gates)
        return row

    def give_back(self, taken: Taken) -> None:
        self._free_edits += reversed(taken.edits)
        self._free_constants += reversed(taken.constants)

    def _take_constant(self, taken: Taken) -> int:
        taken.constants.append(self._free_constants.pop())
        return taken.constants[-1]


@dataclass
class Taken:
    """The rows of one bank that one plan holds."""

    edits: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)

    @property
    def count(self) -> Rows:
        return Rows(len(self.edits), len(self.constants))


def budget_rows(plan: SteeringPlan) -> int:
    """What `plan` takes of the budget of edit rows; constants alone have rows of their own."""
    return 0 if only_shifts(plan) else rows_needed(plan)
