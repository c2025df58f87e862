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
from torch import Tensor

from steer.edits import GAIN, LOWER, OFFSET, UPPER, Block
from steer.engines.vllm.taps.shifts import only_shifts
from steer.laws import LAW_FIELDS
from steer.plan.plan import Gate, SteeringPlan

# Fields of a block's record, and the bits of its flags. Where its edits read elsewhere, KEPT is 1
# more than the place of what they have read among the numbers that a token keeps.
FIRST, COUNT, CONSTANT, FLAGS, CHANNELS, SIDE, ENCODER, KEPT = range(8)
BLOCK_FIELDS = 8
REPLACES, PRESERVES, NEEDS_NORM, NEEDS_PLANE, NEEDS_DEVIATION = 1, 2, 4, 8, 16
CHANNEL_EDITS = 2
"""A block's `channels` lie in the rows of two edits, the second following the first: gain and
offset where others read and write, then the lower and the upper bounds."""

# Fields of a gate.
ABOVE, BELOW, COSINE, GATE_BIAS, ONWARD = range(5)
GATE_FIELDS = 8
LAW_STRIDE = 16
"""Laws, gates and records have a power of two of fields, so that their rows are aligned."""


class Rows(NamedTuple):
    """Rows of one width: edits, and constants (shifts, replacements, sides, gates' directions)."""

    edits: int = 0
    constants: int = 0

    def plus(self, other: Rows) -> Rows:
        return Rows(self.edits + other.edits, self.constants + other.constants)

    def within(self, other: Rows) -> bool:
        return self.edits <= other.edits and self.constants <= other.constants


def rows_of(block: Block) -> Rows:
    """The rows that `block` takes."""
    edits = block.n_edits + CHANNEL_EDITS * (block.channels is not None)
    return Rows(edits, (block.shift is not None) + (block.side is not None))


def rows_needed(plan: SteeringPlan) -> int:
    """The part of the row budget that `plan` takes: its edits or its constants, if those are more.

    With as many constant rows as edit rows, plans whose sum is within the budget always fit.
    """
    total = Rows(0, sum(one.gate is not None for one in plan.rules))
    for one in plan.rules:
        for block in one.blocks.values():
            total = total.plus(rows_of(block))
    return max(total)


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
        for place, constant in ((CONSTANT, block.shift), (SIDE, block.side)):
            if constant is not None:
                record[place] = self._write_constant(constant, taken)
        if block.channels is not None:
            read, write = block.channels[[GAIN, LOWER]], block.channels[[OFFSET, UPPER]]
            record[CHANNELS] = self._write_edits(read, write, taken)[0]
        if block.read is not None and block.write is not None and block.laws is not None:
            rows = self._write_edits(block.read, block.write, taken)
            self.laws[rows, :LAW_FIELDS] = block.laws.to(self.laws)
            record[FIRST], record[COUNT] = rows[0], len(rows)
        record[FLAGS] = (
            REPLACES * block.replace
            | PRESERVES * block.preserve_norm
            | NEEDS_NORM * (block.preserve_norm or block.traits.measures_norm)
            | NEEDS_PLANE * block.traits.planar
            | NEEDS_DEVIATION * block.traits.measures_deviation
        )
        return record

    def write_gate(self, gate: Gate, taken: Taken) -> int:
        """Puts `gate` into a free constant row, which is added to `taken`."""
        assert not gate.pools, "steps with such a gate leave their graph"
        row = self._write_constant(gate.direction, taken)
        law = [gate.above, gate.below, float(gate.cosine), gate.bias, float(gate.onward)]
        self.gates[row, : len(law)] = torch.tensor(law).to(self.gates)
        return row

    def give_back(self, taken: Taken) -> None:
        self._free_edits += reversed(taken.edits)
        self._free_constants += reversed(taken.constants)

    def _write_constant(self, constant: Tensor, taken: Taken) -> int:
        row = self._free_constants.pop()
        taken.constants.append(row)
        self.constants[row] = constant.to(self.constants)
        return row

    def _write_edits(self, read: Tensor, write: Tensor, taken: Taken) -> list[int]:
        """Puts `read` and `write` into free rows, each of which knows the one that follows it."""
        rows = [self._free_edits.pop() for _ in range(len(read))]
        taken.edits += rows
        self.read[rows] = read.to(self.read)
        self.write[rows] = write.to(self.write)
        self.following[rows] = torch.tensor([*rows[1:], 0], dtype=torch.int32).to(self.read.device)
        return rows


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
