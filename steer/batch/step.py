"""One forward pass: what each hook point does to the tokens of a batch.

`build_step` turns requests and the positions they are about to compute into slots by token
(`token_slots.py`) and these into a `Step`; the engine's hooks call `Step.edit` at each hook point,
where gates (`gates.py`) decide before blocks edit; after the pass `Step.finish` counts what was
really applied into the `Ledger` (`ledger.py`).

T tokens of the batch (packed, or a padded batch flattened), P rules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from steer.batch.apply import apply_table, read_table
from steer.batch.gates import Decisions, Gates
from steer.batch.ledger import Ledger
from steer.batch.requests import NOBODY, Ints, Span
from steer.batch.tables import Table, Tables, TableView
from steer.batch.token_slots import TokenSlots
from steer.edits import CarriedReads, apply, read, relative_sizes
from steer.errors import EngineError
from steer.model import HookPoint

_FEW = 0.75
"""Up to this share of a batch, a table works on its own tokens and not on all."""
_SOLO = 4
"""From so many tokens on, edits that belong to one token each are not multiplied with all."""


@dataclass(eq=False)
class _Work:
    """What one rule does at one hook point: to all tokens, or to `rows` alone. `slots` are those
    that have a block there. `readings` are what its edits have read elsewhere in this pass."""

    number: int
    slots: set[int]
    table: Table
    view: TableView
    rows: Tensor | None
    solo: Tensor | None
    readings: CarriedReads | None = None


class Step:
    """One forward pass over T tokens, and with `carry_on` those that follow it.

    Assumes: hooks call `edit` in forward order, once per hook point.
    Guarantees: `finish` raises if an edited hook point was never reached.
    """

    def __init__(self, tables: Tables, ledger: Ledger, tokens: TokenSlots) -> None:
        device = tables.device
        self._tables, self._ledger, self._tokens = tables, ledger, tokens
        self._possible = tokens.slots if tokens.possible is None else tokens.possible
        self._row_index = torch.from_numpy(tokens.rows).clamp_min(0).to(device)
        self._measured = (
            None if tokens.measured is None else torch.from_numpy(tokens.measured).to(device)
        )
        self._shared = tokens.shared
        self._ramps = tokens.ramps
        self._factors = self._factors_on_device()
        self._chosen: dict[tuple[int, ...], Tensor] = {}
        self._editing: dict[HookPoint, list[tuple[int, Tensor]]] = {}
        """For each rule with blocks at a point, which slots have one: where sizes are measured."""
        self._visited: set[HookPoint] = set()
        self.slots = torch.from_numpy(tokens.slots).to(device)
        """The slots `[P, T]` by which tokens are edited; behind a closed gate they are 0."""
        in_use, points = tokens.in_use, tables.points()
        self._gates: Gates | None = None
        gated: set[HookPoint] = set()
        self._gated = tokens.gated
        if tokens.gated is not None:
            self._gates = Gates(tables, ledger, self._row_index, points)
            self.slots = self._gates.close(tokens.slots, tokens.gated)
            gated = self._gates.points(in_use)
        self._work = {point: work for point in points if (work := self._work_at(point, in_use))}
        self._reading: dict[HookPoint, list[_Work]] = {}
        """What reads at each point, and edits behind it."""
        for one in chain.from_iterable(self._work.values()):
            if one.view.reads_at is not None:
                self._reading.setdefault(one.view.reads_at, []).append(one)
        self.points = frozenset(self._work.keys() | self._reading.keys() | gated)

    def edit(self, point: HookPoint, x: Tensor) -> Tensor:
        """`x` `[..., d]`, T rows in all, after the gates and edits of `point`; what is read there
        for edits behind it is read after them, as the model itself reads it."""
        self._visited.add(point)
        if point not in self.points:
            return x
        flat = x.reshape(-1, x.shape[-1])
        if self._gates is not None:
            self._gates.decide(point, flat, self.slots)
        before = flat
        for work in self._work.get(point, ()):
            if self._shared is None:
                flat = self._apply(work, flat)
            elif self._shared[work.number]:
                block = work.table.blocks[self._shared[work.number]]
                factors = None if self._factors is None else self._factors[work.number]
                flat = apply(block, flat, work.readings, factors)
        if flat is not before:
            flat = self._ledger.contained(self._row_index, before, flat)
            if self._measured is not None:
                self._measure(point, before, flat, self._measured & self._edited(point))
        for work in self._reading.get(point, ()):
            work.readings = self._read(work, flat)
        return flat.reshape(x.shape)

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        """Takes the same requests a token further, all of them in what they generate; `changes` are
        the slots `[P]` of the tokens that have others now than in the pass before.

        Assumes: one token for each request, none of them possible where `possible` had none.
        """
        for place, slots in changes.items():
            self._tokens.change(place, slots)
        if self._gates is not None and self._gated is not None:
            self._gated = self._gated.carried_on(self._tokens.slots)
            self.slots = self._gates.close(self._tokens.slots, self._gated)
        elif changes:
            self.slots = torch.from_numpy(self._tokens.slots).to(self._tables.device)
        if self._ramps is not None and self._ramps.carry_on():
            self._factors = self._factors_on_device()

    def take(self, decisions: Decisions) -> None:
        """Does what gates of earlier stages decided in this pass; called before the first hook."""
        if self._gates is not None:
            self._visited |= self._gates.take(decisions, self.slots)

    def decisions(self) -> Decisions | None:
        """What gates have decided in this pass; None where there are none."""
        return None if self._gates is None else self._gates.decisions()

    def finish(self) -> None:
        """Counts what was applied; raises if a hook point was never reached (fail closed)."""
        missed = self.points - self._visited
        if missed:
            raise EngineError(
                f"the forward pass never reached {', '.join(map(str, sorted(missed)))}: the edits "
                "there were not applied, so the result is withheld"
            )
        self._visited = set()
        for work in chain.from_iterable(self._reading.values()):
            work.readings = None
        slots = self._tokens.slots if self._gates is None else self.slots.cpu().numpy()
        present = self._tokens.rows != NOBODY
        applied = np.zeros(slots.shape[1], dtype=np.int64)
        for number in range(len(slots)):
            applied |= (slots[number] != 0).astype(np.int64) << number
        self._ledger.record(self._tokens.rows[present], applied[present])
        if self._ramps is not None:
            shares = np.where(slots != 0, self._ramps.factors, 0)[:, present]
            self._ledger.record_shares(self._tokens.rows[present], shares)

    def _factors_on_device(self) -> Tensor | None:
        """The factors `[P, T]` of ramps, where there are any."""
        if self._ramps is None:
            return None
        return torch.from_numpy(self._ramps.factors).to(self._tables.device)

    def _work_at(self, point: HookPoint, live: set[int]) -> list[_Work]:
        """The tables that this batch's slots use at `point`."""
        found = []
        for number, table in enumerate(self._tables.at(point)):
            if table is None:
                continue
            groups = table.groups(live)
            for mine in groups:
                view = table.view(mine)
                rows = None
                # A view may hold the edits of other groups, so each group is shown its own tokens.
                if len(groups) > 1 or any(view.needs):
                    rows = self._rows_of(number, mine)
                    if len(groups) == 1 and len(rows) > _FEW * self._tokens.slots.shape[1]:
                        rows = None
                solo = self._solo(number, view, rows) if view.needs.edits else None
                found.append(_Work(number, mine, table, view, rows, solo))
        return found

    def _solo(self, number: int, view: TableView, rows: Tensor | None) -> Tensor | None:
        """For each edit of `view` the token it belongs to, among `rows` or all; None where a slot
        is that of several tokens, or where there are too few tokens for it to matter."""
        slots = self._possible[number]
        slots = slots if rows is None else slots[rows.cpu().numpy()]
        if len(slots) < _SOLO:
            return None
        places = np.full(self._tables.slots + 1, -1, dtype=np.int64)
        places[slots] = np.arange(len(slots))
        mine = slots != 0
        found = places[view.owner.cpu().numpy()]
        if (places[slots[mine]] != np.flatnonzero(mine)).any() or (found < 0).any():
            return None
        return torch.from_numpy(found).to(self._tables.device)

    def _rows_of(self, number: int, slots: set[int]) -> Tensor:
        """The tokens that rule `number` may edit by `slots`."""
        key = (number, *sorted(slots))
        if key not in self._chosen:
            wanted = np.zeros(self._tables.slots + 1, dtype=bool)
            wanted[list(slots)] = True
            chosen = np.flatnonzero(wanted[self._possible[number]])
            self._chosen[key] = torch.from_numpy(chosen).to(self._tables.device)
        return self._chosen[key]

    def _apply(self, work: _Work, x: Tensor) -> Tensor:
        slots = self.slots[work.number]
        factors = None if self._factors is None else self._factors[work.number]
        if work.rows is None:
            return apply_table(work.view, x, slots, work.solo, work.readings, factors)
        mine, slots = x.index_select(0, work.rows), slots.index_select(0, work.rows)
        if factors is not None:
            factors = factors.index_select(0, work.rows)
        edited = apply_table(work.view, mine, slots, work.solo, work.readings, factors)
        return x.index_copy(0, work.rows, edited)

    def _read(self, work: _Work, x: Tensor) -> CarriedReads | None:
        """What the edits of `work`, whose tokens' gates may still be closed, read of `x`."""
        if self._shared is not None:
            slot = self._shared[work.number]
            return read(work.table.blocks[slot], x) if slot else None
        slots = self.slots[work.number]
        if work.rows is not None:
            x, slots = x.index_select(0, work.rows), slots.index_select(0, work.rows)
        return read_table(work.view, x, slots, work.solo)

    def _edited(self, point: HookPoint) -> Tensor:
        """Which tokens `[T]` a block of `point` acts on."""
        if point not in self._editing:
            self._editing[point] = [
                (work.number, self._marked(work.slots)) for work in self._work[point]
            ]
        each = [marked[self.slots[number]] for number, marked in self._editing[point]]
        return torch.stack(each).any(dim=0)

    def _marked(self, slots: set[int]) -> Tensor:
        """True at each of `slots`, `[S + 1]`."""
        marked = torch.zeros(self._tables.slots + 1, dtype=torch.bool)
        marked[list(slots)] = True
        return marked.to(self._tables.device)

    def _measure(self, point: HookPoint, before: Tensor, after: Tensor, edited: Tensor) -> None:
        """Measures the `edited` tokens `[T]`; what became of the others does not matter."""
        size = relative_sizes(before, after)
        self._ledger.add_relative(point, self._row_index, size, edited)


@dataclass
class CarriedStep:
    """A step that serves passes over the same requests, each a token further, and how many more
    `passes` there may be."""

    step: Step | None
    passes: int

    def carry_on(self) -> bool:
        """Takes it on by a token; false where it holds no further."""
        if self.passes <= 0:
            return False
        self.passes -= 1
        if self.step is not None:
            self.step.carry_on({})
        return True


def build_step(
    tables: Tables,
    ledger: Ledger,
    spans: Sequence[Span],
    tokens_in_batch: int,
    *,
    reads_tokens: Collection[int] = (),
) -> Step | None:
    """The step that computes `spans`; None where no request in it is steered (`TokenSlots.of`)."""
    tokens = TokenSlots.of(spans, tokens_in_batch, reads_tokens=reads_tokens)
    return None if tokens is None else Step(tables, ledger, tokens)
