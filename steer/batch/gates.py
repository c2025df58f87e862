"""Gates of a batch: what they rule is withheld until they open.

A gate reads the residual stream at its own hook point, before anything that it rules. One of scope
"token" is decided for each token anew; one of scope "prompt" is decided on the last prompt token
and held for the request, in the ledger. One of scope "onward" is open from the first token that
finds it so. Of that the ledger holds the position and not a bit: what it says of tokens that a pass
computes (for the first time, again after a preemption, or in the place of drafts that did not stay)
is decided in that pass, and only what lies before them stands. So it is with the scores of a gate
that pools those of several tokens (`pooling.py`).

Where a model runs in several stages, a gate may rule layers of a stage behind the one that reads
it. So each stage hands on what was decided up to there (`Decisions`), beside the states.

T tokens, P rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from steer.batch.ledger import SHUT, Ledger
from steer.batch.requests import Ints
from steer.batch.tables import HELD, MAX_RULES, ONWARD, GateTable, Tables
from steer.batch.token_slots import GatedTokens
from steer.edits import gate_open, in_range
from steer.model import HookPoint


@dataclass(frozen=True)
class Decisions:
    """What gates decided in one pass: `opened` are the rules whose gate each token finds open, as
    bits; `values` is what their gates read, NaN where none did."""

    opened: Int[Tensor, " T"]
    values: Float[Tensor, "T P"]

    @staticmethod
    def none(tokens: int, device: torch.device) -> Decisions:
        """Those of `tokens` tokens before any gate has read."""
        opened = torch.zeros(tokens, dtype=torch.int32, device=device)
        return Decisions(opened, torch.full((tokens, MAX_RULES), float("nan"), device=device))

    def beside(self, other: Decisions) -> Decisions:
        """These and those about other tokens of the same pass."""
        values = torch.where(self.values.isnan(), other.values, self.values)
        return Decisions(self.opened | other.opened, values)


@dataclass(frozen=True)
class _Shown:
    """The tokens of a pass that one table of gates is shown, G of T: those of requests with a gate
    in it, whether its rule selects them or not.

    `places` are theirs in the batch, `rows` those in the ledger, `selected` their slots behind an
    open gate. `held` are those whose gate is decided once for the request, `follows` those of them
    that come after the token which decides, and `onward` those whose gate stays open: None where
    there are none. `deciding` are the numbers among the G of the D tokens that decide.
    """

    number: int
    gates: GateTable
    places: Int[Tensor, " G"]
    rows: Int[Tensor, " G"]
    read: Int[Tensor, " G"]
    selected: Int[Tensor, " G"]
    held: Bool[Tensor, " G"] | None
    follows: Bool[Tensor, " G"] | None
    deciding: Int[Tensor, " D"]
    onward: Bool[Tensor, " G"] | None

    @cached_property
    def laws(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What each token's gate is: direction, cosine, above, below and bias (`gate_open`)."""
        gates, read = self.gates, self.read
        each = (gates.direction, gates.cosine, gates.above, gates.below, gates.bias)
        direction, cosine, above, below, bias = (one.index_select(0, read) for one in each)
        return direction, cosine, above, below, bias


class Gates:
    """The gates of one pass, and with `close` again of those that carry it on.

    Nothing is computed of tokens that have no gate.

    Assumes: `decide` is called in forward order, once per hook point.
    """

    def __init__(
        self, tables: Tables, ledger: Ledger, rows: Int[Tensor, " T"], points: set[HookPoint]
    ) -> None:
        """`rows` are the tokens' rows in the ledger."""
        self._ledger, self._rows = ledger, rows
        self._tables = {
            point: live
            for point in points
            if (live := [(n, g) for n, g in enumerate(tables.gates(point)) if g and g.live])
        }
        self._made: dict[tuple[HookPoint, int], tuple[bytes, _Shown]] = {}
        """What each table was shown last, and by what that is known."""
        self._shown: dict[HookPoint, list[_Shown]] = {}
        self._decided: list[tuple[_Shown, Tensor, Tensor]] = []
        """Which tokens find their gates open, and what was read, as it is decided."""

    def points(self, slots: set[int]) -> set[HookPoint]:
        """The hook points at which gates of `slots` read."""
        return {p for p, row in self._tables.items() if any(slots & g.live for _, g in row)}

    def close(self, slots: Ints, tokens: GatedTokens) -> Int[Tensor, "P T"]:
        """`slots` `[P, T]` as far as they are free: those behind a gate are 0 until `decide`.

        A decision that a request holds is taken as it stands by the tokens after the one that made
        it, also where the prompt is computed anew in the same pass.
        """
        found = torch.tensor(slots, device=self._rows.device)
        self._decided = []
        self._forget_coming(tokens)
        self._windows = self._ledger.scores.expect(tokens.pooled, tokens.read, tokens.positions)
        self._shown = {}
        for point, row in self._tables.items():
            each = [
                shown
                for number, gates in row
                if number < len(slots)
                and (shown := self._shown_to(point, number, gates, slots, tokens)) is not None
            ]
            self._shown[point] = each
            for shown in each:
                if shown.follows is None:
                    found[shown.number].index_fill_(0, shown.places, 0)
                else:
                    remembered = self._ledger.gate_open[shown.rows, shown.number]
                    free = torch.where(shown.follows & remembered, shown.selected, 0)
                    found[shown.number].index_copy_(0, shown.places, free)
        return found

    def decide(self, point: HookPoint, x: Float[Tensor, "T d"], slots: Int[Tensor, "P T"]) -> None:
        """Lets the gates that read `point` decide, and opens `slots` in place where they do."""
        for shown in self._shown.get(point, ()):
            opened, value = gate_open(x.index_select(0, shown.places), *shown.laws)
            windows = self._windows.get((point, shown.number))
            if windows is not None:
                _, _, above, below, _ = shown.laws
                of_all = value.new_zeros(len(x)).index_copy(0, shown.places, value)
                pooled = self._ledger.scores.pooled(windows, of_all)
                value = pooled.index_select(0, shown.places)
                opened = in_range(value, above, below)
            self._rule(shown, opened, value, slots)

    def take(self, decisions: Decisions, slots: Int[Tensor, "P T"]) -> set[HookPoint]:
        """Opens `slots` in place where gates of earlier stages did; the hook points of these."""
        for each in self._shown.values():
            for shown in each:
                if shown.gates.elsewhere:
                    bits = decisions.opened.index_select(0, shown.places)
                    value = decisions.values[:, shown.number].index_select(0, shown.places)
                    self._rule(shown, (bits >> shown.number & 1).bool(), value, slots)
        return {p for p, row in self._tables.items() if any(gates.elsewhere for _, gates in row)}

    def decisions(self) -> Decisions:
        """What this stage and those before it have decided in the pass so far."""
        found = Decisions.none(len(self._rows), self._rows.device)
        for shown, opened, value in self._decided:
            found.opened[shown.places] |= opened.int() << shown.number
            found.values[shown.places, shown.number] = value
        return found

    def _shown_to(
        self, point: HookPoint, number: int, gates: GateTable, slots: Ints, tokens: GatedTokens
    ) -> _Shown | None:
        """What rule `number` at `point` is shown: what it was before, where that is the same."""
        read = tokens.read[number]
        places = np.flatnonzero(gates.kinds[read])
        if not len(places):
            return None
        read, selected, left = read[places], slots[number, places], tokens.until_decision[places]
        key = np.stack((places, read, selected, np.sign(left))).tobytes()
        made = self._made.get((point, number))
        if made is not None and made[0] == key:
            return made[1]
        kinds, at = gates.kinds[read], self._on_device(places)
        held = kinds == HELD
        shown = _Shown(
            number,
            gates,
            at,
            self._rows[at],
            self._on_device(read),
            self._on_device(selected),
            self._if_any(held),
            self._if_any(held & (left < 0)),
            self._on_device(np.flatnonzero(held & (left == 0))),
            self._if_any(kinds == ONWARD),
        )
        self._made[point, number] = key, shown
        return shown

    def _rule(
        self,
        shown: _Shown,
        opened: Bool[Tensor, " G"],
        value: Float[Tensor, " G"],
        slots: Int[Tensor, "P T"],
    ) -> None:
        """Opens `slots` of the tokens `shown` by what each one's gate decided; what is decided for
        a request is kept."""
        number, ledger = shown.number, self._ledger
        if len(shown.deciding):
            rows = shown.rows[shown.deciding]
            ledger.gate_open[rows, number] = opened[shown.deciding]
            ledger.gate_value[rows, number] = value[shown.deciding]
        if shown.held is not None:
            # Tokens after the last prompt token may be computed in the pass that decides.
            opened = torch.where(shown.held, ledger.gate_open[shown.rows, number], opened)
        if shown.onward is not None:
            opened = self._from_onset(shown, shown.onward, opened, value)
        slots[number].index_copy_(0, shown.places, torch.where(opened, shown.selected, 0))
        self._decided.append((shown, opened, value))

    def _forget_coming(self, tokens: GatedTokens) -> None:
        """Forgets where onward gates opened at tokens that this pass computes, or that come after
        them."""
        onset = self._ledger.onset
        if not tokens.onward.any():
            return
        self._positions = self._on_device(tokens.positions)
        for number, slots in enumerate(tokens.onward):
            theirs = np.flatnonzero(slots)
            if len(theirs):
                rows, begins = self._rows[self._on_device(theirs)], tokens.begins[theirs]
                known = onset[rows, number]
                onset[rows, number] = torch.where(known < self._on_device(begins), known, SHUT)

    def _from_onset(
        self,
        shown: _Shown,
        onward: Bool[Tensor, " G"],
        opened: Bool[Tensor, " G"],
        value: Float[Tensor, " G"],
    ) -> Bool[Tensor, " G"]:
        """`opened`, and of `onward` gates whether each token is the first that opened it, or comes
        after that one; the ledger then holds where that was, and what was read there.

        What an earlier stage decided of each token may be given as well: it gives the same.
        """
        ledger, rows, number = self._ledger, shown.rows, shown.number
        positions = self._positions[shown.places]
        found = torch.where(onward & opened, positions, SHUT)
        onset = ledger.onset[:, number].scatter_reduce(0, rows, found, "amin")
        ledger.onset[:, number] = onset
        of_token = onset[rows]
        first = onward & (positions == of_token)
        ledger.gate_value[rows[first], number] = value[first]
        return torch.where(onward, of_token <= positions, opened)

    def _if_any(self, mask: NDArray[np.bool_]) -> Tensor | None:
        return torch.from_numpy(mask).to(self._rows.device) if mask.any() else None

    def _on_device(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self._rows.device)
