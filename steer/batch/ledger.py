"""What was really applied to the requests that run: the source of their receipts."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.pooling import PooledScores
from steer.batch.requests import NOBODY, Ints
from steer.batch.sizes import MeanSizes
from steer.batch.tables import MAX_RULES
from steer.model import HookPoint
from steer.plan.selection import Factors

_LOOKED_AT = 256
"""Positions that are looked at together."""
RULES = (1 << MAX_RULES) - 1
"""The bits of a position that name the rules applied there."""
DRAFTED = 1 << MAX_RULES
"""Marks a position whose token was drafted before it was computed."""
UNSEEN = 0xFFFF
"""Marks a position that no pass has computed."""
SOUND = torch.iinfo(torch.int64).max
"""Stands for the position of what was not finite, where everything was."""
SHUT = torch.iinfo(torch.int64).max
"""Stands for the position at which a gate opened that has not."""
_BY_ROW = (
    "tokens",
    "shares",
    "gate_open",
    "gate_value",
    "onset",
    "lost",
    "drafted",
    "_first_draft",
    "_unsettled",
)
"""What a `PositionLedger` keeps of each row, whatever its length."""


class Ledger:
    """What was applied to each request row, and the decisions that its gates hold.

    `tokens[row, applied]` counts the tokens that the rules named by `applied` edited, and
    `shares[row, rule]` sums the factors by which ramps multiplied what the rule did. `relative` has
    how large the edits at a hook point were, where that was measured. `onset[row, rule]` is the
    position of the first token that opened an onward gate, `SHUT` before that; of tokens that are
    computed anew it says nothing until they are. `scores` are those that pooled gates have read, by
    position.
    Assumes: a row is reset before a request takes it.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu", *, drafts: int = 0) -> None:
        """`drafts` is the most tokens of a request that a pass computes without knowing yet
        whether they stay."""
        self.drafts = drafts
        self.tokens = np.zeros((rows, 1 << MAX_RULES), dtype=np.int64)
        self.shares = np.zeros((rows, MAX_RULES))
        self.gate_open = torch.zeros(rows, MAX_RULES, dtype=torch.bool, device=device)
        self.gate_value = torch.full((rows, MAX_RULES), float("nan"), device=device)
        self.onset = torch.full((rows, MAX_RULES), SHUT, device=device)
        self.scores = PooledScores(device)
        self.relative: dict[HookPoint, MeanSizes] = {}

    def reset(self, row: int) -> None:
        self.gate_open[row] = False
        self.gate_value[row] = float("nan")
        self.onset[row] = SHUT
        self.scores.forget(row)
        self.recount(row)

    def record(self, rows: Ints, applied: Ints) -> None:
        """Counts tokens `[T]` of `rows` that the rules named by `applied` edited."""
        # One flat index: numpy adds at several ten times more slowly.
        np.add.at(self.tokens.reshape(-1), rows * self.tokens.shape[1] + applied, 1)

    def record_shares(self, rows: Ints, shares: Factors) -> None:
        """Sums the factors `[P, T]` of the tokens of `rows`; 0 where a rule did not act."""
        for number, mine in enumerate(shares):
            np.add.at(self.shares[:, number], rows, mine)

    def recount(self, row: int) -> None:
        """Counts a row from zero again, because its tokens are computed anew; its gates' decisions
        stand."""
        self.tokens[row] = 0
        self.shares[row] = 0
        for sizes in self.relative.values():
            sizes.reset(row)

    def contained(self, rows: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG002
        """States `[T, d]` of `rows` as the model goes on with them after an edit."""
        return after

    def add_relative(self, point: HookPoint, rows: Tensor, sizes: Tensor, edited: Tensor) -> None:
        """Takes ‖Δx‖/‖x‖ of the tokens `[T]` that were `edited` into the means of their rows."""
        if point not in self.relative:
            count = len(self.gate_open)
            self.relative[point] = MeanSizes(count, self.drafts, sizes.device)
        self.relative[point].add(rows, self._draft_numbers(), sizes, edited)

    def _draft_numbers(self) -> Tensor | None:
        """The number from 1 of each token `[T]` that is a draft; None where none is."""
        return None


class PositionLedger(Ledger):
    """A `Ledger` that also keeps the rules applied at each position, and that grows.

    vLLM may compute a token twice (after a preemption), or never (when its state comes from the
    prefix cache), or once too often (while a stop string is being noticed, or because it was
    drafted and another one stands there in the end). A ledger by position is right in all these
    cases: a receipt looks at the positions that its sequence fed, once each, and what a pass found
    at a drafted token is forgotten where `settle` says that the token did not stay.

    Assumes: `expect` names the positions of the batch before a step is begun, and again before it
    is finished where another batch was named in between; `draft` comes after `settle`.
    """

    def __init__(
        self, rows: int, max_length: int, device: torch.device, *, drafts: int = 0
    ) -> None:
        super().__init__(rows, device, drafts=drafts)
        self.applied = np.full((rows, max_length), UNSEEN, dtype=np.uint16)
        """The rules applied at each position, and whether its token had been drafted."""
        self.lost = torch.full((rows,), SOUND, device=device)
        """The first position of each row at which a state, or the logits, were not finite."""
        self.drafted = np.zeros(rows, dtype=np.int64)
        """How many tokens were drafted for each row, as far as it is known which of them stayed."""
        self._first_draft = np.zeros(rows, dtype=np.int64)
        self._unsettled = np.zeros(rows, dtype=np.int64)
        self._rows: Ints = np.zeros(0, dtype=np.int64)
        self._positions: Ints = np.zeros(0, dtype=np.int64)
        self._present: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._on_device: dict[str, Tensor] = {}
        """What is known of the tokens of the pass, `[T]`, where somebody asked for it."""

    def contained(self, rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """`after`, and `before` for tokens that the edit drove beyond all numbers: their requests
        are known by it and get no answer, and the cache holds nothing by which attention over a
        block's unused end (0 · NaN) would harm others.

        Beyond all numbers is a state whose norm is not finite. It has to be kept out here, since
        the next layer writes keys and values of it; on a CPU one look at the whole pass, the
        norm of all its states together, tells that there is none.
        """
        if after.device.type == "cpu" and all_finite(after):
            return after
        sound = after.float().norm(dim=-1).isfinite()
        lost = ~sound & before.float().norm(dim=-1).isfinite()
        self.lose(rows, self._device_positions(), lost)
        return torch.where(lost[:, None], before, after)

    def lose(self, rows: Tensor, positions: Tensor, lost: Tensor) -> None:
        """Takes note of the tokens `[T]` that are `lost`: something of them was not finite. Waits
        for no device."""
        self.lost.scatter_reduce_(0, rows, torch.where(lost, positions, SOUND), "amin")

    def runs_over(self, row: int, end: int) -> bool:
        """Whether something before position `end` of `row` was not finite."""
        return bool(self.lost[row] < end)

    def expect(self, rows: Ints, positions: Ints) -> None:
        """The row and the position of each token of the pass that comes; `NOBODY` is nobody's."""
        self._present = rows != NOBODY
        self._rows, self._positions = rows, positions
        self._on_device.clear()

    def draft(self, rows: Ints, first: Ints, counts: Ints) -> None:
        """The coming pass computes `counts` drafted tokens of each of `rows`, from the positions
        `first` on."""
        self._first_draft[rows], self._unsettled[rows] = first, counts

    @property
    def unsettled(self) -> bool:
        """Whether drafted tokens were computed of which nobody has said whether they stayed."""
        return bool(self._unsettled.any())

    def settle(self, rows: Ints, fed: Ints) -> None:
        """Of the tokens drafted last for `rows`, those at positions before `fed` stayed; the others
        were never fed.

        Assumes: what their pass did has been written down.
        """
        drafted = self._unsettled[rows]
        if not drafted.any():
            return
        rows, fed, drafted = rows[drafted > 0], fed[drafted > 0], drafted[drafted > 0]
        first = self._first_draft[rows]
        stayed = np.clip(fed - first, 0, drafted)
        for row, start, end in zip(rows, first + stayed, first + drafted, strict=True):
            self.applied[row, start:end] = UNSEEN
        self.drafted[rows] += drafted
        self._unsettled[rows] = 0
        index = torch.from_numpy(rows).to(self.lost.device)
        gone = torch.from_numpy(first + stayed).to(self.lost.device)
        lost = self.lost[index]
        self.lost[index] = torch.where(lost < gone, lost, SOUND)
        for sizes in self.relative.values():
            sizes.settle(index, torch.from_numpy(stayed).to(self.lost.device))

    def accepted(self, row: int, fed: int) -> int:
        """How many of the first `fed` tokens of `row` had been drafted."""
        seen = self.applied[row, :fed]
        return int(((seen != UNSEEN) & (seen & DRAFTED != 0)).sum())

    def reset(self, row: int) -> None:
        super().reset(row)
        self.applied[row] = UNSEEN
        self.lost[row] = SOUND
        self.drafted[row] = self._unsettled[row] = 0

    def record(self, rows: Ints, applied: Ints) -> None:
        """Writes the applied of the present tokens; `rows` holds these alone."""
        super().record(rows, applied)
        self.write(rows, self._positions[self._present], applied)

    def record_shares(self, rows: Ints, shares: Factors) -> None:
        """Factors follow from the positions that it keeps."""

    def write(self, rows: Ints, positions: Ints, applied: Ints) -> None:
        """Writes the rules `applied` at `positions` `[T]` of `rows`."""
        if self.drafts:
            seen = self.applied[rows, positions]
            # A drafted token that stayed may be computed again.
            stayed = (seen != UNSEEN) & (seen & DRAFTED != 0)
            drafted = stayed | (self._numbers(rows, positions) > 0)
            applied = applied | np.where(drafted, DRAFTED, 0)
        self.applied[rows, positions] = applied.astype(np.uint16)

    def row(self, row: int, prompt_length: int) -> PositionLedger:
        """A ledger that holds a copy of one row, as far as positions were computed.

        Assumes: behind the prompt no position was left out, so that those after the first unseen
        one need not be looked at.
        """
        length = self._end(row, prompt_length)
        alone = PositionLedger(1, length, self.gate_open.device, drafts=self.drafts)
        alone.applied[0] = self.applied[row, :length]
        for name in _BY_ROW:
            getattr(alone, name)[0] = getattr(self, name)[row]
        alone.relative = {point: sizes.row(row) for point, sizes in self.relative.items()}
        return alone

    def forget(self, row: int, first: int) -> None:
        """Positions of `row` from `first` on, which its sequence has not kept."""
        self.applied[row, first:] = UNSEEN

    def widen(self, length: int) -> None:
        """Makes room for positions up to `length`."""
        rows, had = self.applied.shape
        if length > had:
            more = np.full((rows, max(length, 2 * had) - had), UNSEEN, dtype=np.uint16)
            self.applied = np.concatenate([self.applied, more], axis=1)

    def grow(self) -> None:
        """Doubles the number of rows."""
        rows, length = self.applied.shape
        bigger = PositionLedger(2 * rows, length, self.gate_open.device, drafts=self.drafts)
        for name in ("applied", *_BY_ROW):
            getattr(bigger, name)[:rows] = getattr(self, name)
            setattr(self, name, getattr(bigger, name))
        for sizes in self.relative.values():
            sizes.grow()

    def _end(self, row: int, prompt_length: int) -> int:
        """The position behind the last one of `row` that was computed."""
        applied = self.applied[row]
        start, size = min(prompt_length, len(applied)), _LOOKED_AT
        while start < len(applied):
            unseen = np.flatnonzero(applied[start : start + size] == UNSEEN)
            if len(unseen):
                start += int(unseen[0])
                break
            start, size = start + size, 2 * size
        if start > prompt_length:
            return min(start, len(applied))
        seen = np.flatnonzero(applied[:start] != UNSEEN)
        return int(seen[-1]) + 1 if len(seen) else 0

    def _numbers(self, rows: Ints, positions: Ints) -> Ints:
        """The number from 1 of each token that is one of those drafted last for its row; else 0."""
        numbers = np.maximum(positions - self._first_draft[rows] + 1, 0)
        return np.where(numbers <= self._unsettled[rows], numbers, 0)

    def _draft_numbers(self) -> Tensor | None:
        if not self.drafts:
            return None
        if "numbers" not in self._on_device:
            numbers = np.where(self._present, self._numbers(self._rows, self._positions), 0)
            self._on_device["numbers"] = torch.from_numpy(numbers).to(self.lost.device)
        return self._on_device["numbers"]

    def _device_positions(self) -> Tensor:
        if "positions" not in self._on_device:
            positions = torch.from_numpy(self._positions).to(self.lost.device)
            self._on_device["positions"] = positions
        return self._on_device["positions"]


def all_finite(states: Tensor) -> bool:
    """Whether the norm of `states` `[T, d]` is finite, all together; then each one's is.

    Assumes: on a CPU, where looking at a number waits for nobody.
    """
    flat = states.reshape(-1)
    flat = flat if flat.dtype == torch.float32 else flat.float()
    return math.isfinite(float(torch.dot(flat, flat)))
