"""One forward pass: which slot every token has, and what is known afterwards.

`build_step` turns requests (`requests.py`) and the positions they are about to compute into a
`Step`; the engine's hooks call `Step.edit` at each hook point; after the pass `Step.finish`
counts what was really applied into the `Ledger` (`ledger.py`).

T tokens of the batch (packed, or a padded batch flattened), P rules, R request rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.apply import apply_table
from steer.batch.ledger import Ledger
from steer.batch.requests import NOBODY, Ints, Span
from steer.batch.tables import GateTable, Table, Tables, TableView
from steer.edits import apply, gate_open
from steer.errors import EngineError
from steer.model import HookPoint

_FEW = 0.75
"""Up to this share of a batch, a table works on its own tokens and not on all."""
_SOLO = 4
"""From so many tokens on, edits that belong to one token each are not multiplied with all."""


class _Work(NamedTuple):
    """What one rule does at one hook point: to all tokens, or to `rows` alone."""

    number: int
    table: Table
    view: TableView
    rows: Tensor | None
    solo: Tensor | None


class Step:
    """One forward pass over T tokens, and with `carry_on` those that follow it.

    Assumes: hooks call `edit` in forward order, once per hook point.
    Guarantees: `finish` raises if an edited hook point was never reached.
    """

    def __init__(
        self,
        tables: Tables,
        ledger: Ledger,
        slots: Ints,
        rows: Ints,
        until_decision: Ints | None = None,
        watching: Ints | None = None,
        measured: NDArray[np.bool_] | None = None,
        possible: Ints | None = None,
    ) -> None:
        """`possible` `[P, T]` are the slots that tokens may have in the passes to come; None where
        these are their `slots`."""
        device = tables.device
        self._tables, self._ledger, self._rows = tables, ledger, rows
        self._host_slots = slots
        self._possible = slots if possible is None else possible
        self.slots = torch.from_numpy(slots).to(device)
        self._row_index = torch.from_numpy(rows).clamp_min(0).to(device)
        self._pending: Tensor | None = None
        self._measured = None if measured is None else torch.from_numpy(measured).to(device)
        self._uniform = None if possible is not None else self._uniform_slots(slots)
        self._chosen: dict[tuple[int, ...], Tensor] = {}
        live = set(self._possible.ravel().tolist()) - {0}
        points = tables.points()
        self._points = points
        if until_decision is not None and watching is not None:
            read = np.where(watching, watching, slots)
            live |= set(read.ravel().tolist()) - {0}
            self._close_gates(
                points,
                torch.from_numpy(until_decision).to(device),
                torch.from_numpy(read).to(device),
            )
        self._work = {point: work for point in points if (work := self._work_at(point, live))}
        gated = {p for p in points if self._gates_at(p, live)}
        self.points = frozenset(self._work.keys() | gated)
        self._visited: set[HookPoint] = set()

    def edit(self, point: HookPoint, x: Tensor) -> Tensor:
        """`x` `[..., d]`, T rows in all, after the gates and edits of `point`."""
        self._visited.add(point)
        if point not in self.points:
            return x
        flat = x.reshape(-1, x.shape[-1])
        for number, gates in enumerate(self._tables.gates(point)[: len(self.slots)]):
            if gates is not None and gates.live and self._pending is not None:
                self._decide(number, gates, flat)
        before = flat
        for work in self._work.get(point, ()):
            if self._uniform is None:
                flat = self._apply(work, flat)
            elif self._uniform[work.number]:
                flat = apply(work.table.blocks[self._uniform[work.number]], flat)
        if self._measured is not None and flat is not before:
            self._measure(point, before, flat)
        return flat.reshape(x.shape)

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        """Takes the same requests a token further, all of them in what they generate; `changes` are
        the slots `[P]` of the tokens that have others now than in the pass before.

        Assumes: one token for each request, none of them possible where `possible` had none.
        """
        for place, slots in changes.items():
            self._host_slots[:, place] = 0
            self._host_slots[: len(slots), place] = slots
        gated = self._pending is not None
        if changes or gated:
            self.slots = torch.from_numpy(self._host_slots).to(self._tables.device)
        if gated:
            self._close_gates(self._points, torch.full_like(self.slots[0], -1), self.slots)

    def finish(self) -> None:
        """Counts what was applied; raises if a hook point was never reached (fail closed)."""
        missed = self.points - self._visited
        if missed:
            raise EngineError(
                f"the forward pass never reached {', '.join(map(str, sorted(missed)))}: the edits "
                "there were not applied, so the result is withheld"
            )
        self._visited = set()
        slots = self._host_slots if self._pending is None else self.slots.cpu().numpy()
        present = self._rows != NOBODY
        applied = np.zeros(slots.shape[1], dtype=np.int64)
        for number in range(len(slots)):
            applied |= (slots[number] != 0).astype(np.int64) << number
        self._ledger.record(self._rows[present], applied[present])

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
                    if len(groups) == 1 and len(rows) > _FEW * self._host_slots.shape[1]:
                        rows = None
                solo = self._solo(number, view, rows) if view.needs.edits else None
                found.append(_Work(number, table, view, rows, solo))
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
        if work.rows is None:
            return apply_table(work.view, x, slots, work.solo)
        mine, slots = x.index_select(0, work.rows), slots.index_select(0, work.rows)
        return x.index_copy(0, work.rows, apply_table(work.view, mine, slots, work.solo))

    def _gates_at(self, point: HookPoint, live: set[int]) -> bool:
        return any(g is not None and live & g.live for g in self._tables.gates(point))

    def _uniform_slots(self, slots: Ints) -> list[int] | None:
        """The slot of each rule where all tokens share it and blocks can be applied directly."""
        if slots.shape[1] == 0 or not (slots == slots[:, :1]).all():
            return None
        return [int(slot) for slot in slots[:, 0]]

    def _close_gates(self, points: set[HookPoint], until_decision: Tensor, read: Tensor) -> None:
        """Withholds gated slots until their gate opens.

        `read` `[P, T]` are the slots whose gates each token is shown to: its own, and on the last
        prompt token also those of rules that select only later tokens.
        `until_decision` `[T]` counts the tokens to the one that decides held gates. A held decision
        is taken as it stands by the tokens after that one, also where the prompt is computed anew
        in the same pass.
        """
        self._uniform = None
        self._deciding = until_decision == 0
        self._read = read
        self._pending = self.slots
        gated = torch.zeros_like(self.slots, dtype=torch.bool)
        held = torch.zeros_like(gated)
        for point in points:
            for number, gates in enumerate(self._tables.gates(point)[: len(self.slots)]):
                if gates is not None and gates.live:
                    gated[number] |= (gates.held | gates.per_token)[self._pending[number]]
                    held[number] |= gates.held[self._pending[number]]
        remembered = self._ledger.gate_open[self._row_index, : len(self.slots)].T
        free = ~gated | (held & remembered & (until_decision < 0))
        self.slots = torch.where(free, self._pending, 0)

    def _decide(self, number: int, gates: GateTable, x: Tensor) -> None:
        if self._pending is None:
            return
        pending, read = self._pending[number], self._read[number]
        opened, value = gate_open(
            x, gates.direction[read], gates.cosine[read], gates.above[read], gates.below[read]
        )
        deciding = gates.held[read] & self._deciding
        if bool(deciding.any()):
            rows = self._row_index[deciding]
            self._ledger.gate_open[rows, number] = opened[deciding]
            self._ledger.gate_value[rows, number] = value[deciding]
        # Tokens after the last prompt token may be computed in the pass that decides.
        held = gates.held[pending]
        opened = torch.where(held, self._ledger.gate_open[self._row_index, number], opened)
        decided = held | gates.per_token[pending]
        self.slots[number] = torch.where(
            decided, torch.where(opened, pending, 0), self.slots[number]
        )

    def _measure(self, point: HookPoint, before: Tensor, after: Tensor) -> None:
        tiny = torch.finfo(torch.float32).tiny
        size = (after.float() - before.float()).norm(dim=-1) / before.float().norm(
            dim=-1
        ).clamp_min(tiny)
        self._ledger.add_relative(point, self._row_index, size * self._measured)


def build_step(
    tables: Tables,
    ledger: Ledger,
    spans: Sequence[Span],
    tokens_in_batch: int,
    *,
    reads_tokens: Collection[int] = (),
) -> Step | None:
    """The step that computes `spans`; None where no request in it is steered.

    Unsteered requests may be left out of `spans`; padding belongs to none. The tokens of spans
    at the offsets `reads_tokens` may have other slots when the step is carried on.
    """
    steered = [span for span in spans if span.request.plan is not None and span.request.plan.rules]
    if not steered:
        return None
    n_rules = max(len(span.request.plan.rules) for span in steered if span.request.plan)
    slots = np.zeros((n_rules, tokens_in_batch), dtype=np.int64)
    rows = np.full(tokens_in_batch, NOBODY, dtype=np.int64)
    until_decision = np.ones(tokens_in_batch, dtype=np.int64)
    watching = np.zeros_like(slots)
    measured = np.zeros(tokens_in_batch, dtype=bool)
    possible = slots.copy() if reads_tokens else None
    for span in steered:
        request, place = span.request, slice(span.offset, span.offset + len(span.positions))
        mine = request.slots(span.positions, span.tokens)
        slots[: len(mine), place] = mine
        rows[place] = request.row
        if request.plan is not None and request.plan.gated:
            watching[: len(mine), place] = request.watching(span.positions)
        until_decision[place] = request.prompt_length - 1 - span.positions
        measured[place] = request.measure
        if possible is not None:
            may_change = span.offset in reads_tokens
            possible[: len(mine), place] = request.possible if may_change else mine
    gated = any(span.request.plan.gated for span in steered if span.request.plan)
    return Step(
        tables,
        ledger,
        slots,
        rows,
        until_decision if gated else None,
        watching if gated else None,
        measured if measured.any() else None,
        possible,
    )
