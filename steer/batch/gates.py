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

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.batch.ledger import SHUT, Ledger
from steer.batch.requests import Ints
from steer.batch.tables import MAX_RULES, GateTable, Tables
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


class Gates:
    """The gates of one pass, and with `close` again of those that carry it on.

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
        self._decided: list[tuple[int, GateTable, Tensor, Tensor]] = []
        """Rule, gates, which tokens find them open, and what was read, as it is decided."""

    def points(self, slots: set[int]) -> set[HookPoint]:
        """The hook points at which gates of `slots` read."""
        return {p for p, row in self._tables.items() if any(slots & g.live for _, g in row)}

    def close(self, slots: Int[Tensor, "P T"], tokens: GatedTokens) -> Int[Tensor, "P T"]:
        """`slots` as far as they are free: those behind a gate are 0 until `decide`.

        A decision that a request holds is taken as it stands by the tokens after the one that made
        it, also where the prompt is computed anew in the same pass.
        """
        device = slots.device
        until_decision = torch.from_numpy(tokens.until_decision).to(device)
        self._selected, self._read = slots, torch.from_numpy(tokens.read).to(device)
        self._deciding = until_decision == 0
        self._decided = []
        self._positions = torch.from_numpy(tokens.positions).to(device)
        self._forget_coming(tokens.onward, torch.from_numpy(tokens.begins).to(device))
        self._windows = self._ledger.scores.expect(tokens.pooled, tokens.read, tokens.positions)
        gated = torch.zeros_like(slots, dtype=torch.bool)
        held = torch.zeros_like(gated)
        for row in self._tables.values():
            for number, gates in row:
                if number < len(slots):
                    gated[number] |= (gates.held | gates.per_token)[slots[number]]
                    held[number] |= gates.held[slots[number]]
        remembered = self._ledger.gate_open[self._rows, : len(slots)].T
        free = ~gated | (held & remembered & (until_decision < 0))
        return torch.where(free, slots, 0)

    def decide(self, point: HookPoint, x: Float[Tensor, "T d"], slots: Int[Tensor, "P T"]) -> None:
        """Lets the gates that read `point` decide, and opens `slots` in place where they do."""
        for number, gates in self._tables.get(point, ()):
            if number < len(slots):
                read = self._read[number]
                opened, value = gate_open(
                    x,
                    gates.direction[read],
                    gates.cosine[read],
                    gates.above[read],
                    gates.below[read],
                    gates.bias[read],
                )
                windows = self._windows.get((point, number))
                if windows is not None:
                    value = self._ledger.scores.pooled(windows, value)
                    opened = in_range(value, gates.above[read], gates.below[read])
                self._rule(number, gates, opened, value, slots)

    def take(self, decisions: Decisions, slots: Int[Tensor, "P T"]) -> set[HookPoint]:
        """Opens `slots` in place where gates of earlier stages did; the hook points of these."""
        found = set()
        for point, row in self._tables.items():
            for number, gates in row:
                if gates.elsewhere:
                    found.add(point)
                    if number < len(slots):
                        opened = (decisions.opened >> number & 1).bool()
                        self._rule(number, gates, opened, decisions.values[:, number], slots)
        return found

    def decisions(self) -> Decisions:
        """What this stage and those before it have decided in the pass so far."""
        found = Decisions.none(len(self._rows), self._rows.device)
        for number, gates, opened, value in self._decided:
            read = self._read[number]
            ruled = gates.held[read] | gates.per_token[read]
            found.opened.bitwise_or_((ruled & opened).int() << number)
            found.values[:, number] = torch.where(ruled, value, found.values[:, number])
        return found

    def _rule(
        self,
        number: int,
        gates: GateTable,
        opened: Bool[Tensor, " T"],
        value: Float[Tensor, " T"],
        slots: Int[Tensor, "P T"],
    ) -> None:
        """Opens `slots` of rule `number` by what each token's gate decided; what is decided for a
        request is kept."""
        read, selected = self._read[number], self._selected[number]
        deciding = gates.held[read] & self._deciding
        if bool(deciding.any()):
            rows = self._rows[deciding]
            self._ledger.gate_open[rows, number] = opened[deciding]
            self._ledger.gate_value[rows, number] = value[deciding]
        # Tokens after the last prompt token may be computed in the pass that decides.
        held = self._ledger.gate_open[self._rows, number]
        opened = torch.where(gates.held[read], held, opened)
        if gates.opening:
            opened = self._from_onset(number, gates, opened, value)
        ruled = gates.held[selected] | gates.per_token[selected]
        slots[number] = torch.where(ruled, torch.where(opened, selected, 0), slots[number])
        self._decided.append((number, gates, opened, value))

    def _forget_coming(self, onward: Ints, begins: Int[Tensor, " T"]) -> None:
        """Forgets where onward gates opened at tokens that this pass computes, or that come after
        them: for requests that have `onward` `[P, T]` slots, whose first tokens are `begins`."""
        onset = self._ledger.onset
        for number, slots in enumerate(onward):
            if slots.any():
                theirs = torch.from_numpy(slots != 0).to(onset.device)
                rows = self._rows[theirs]
                known = onset[rows, number]
                onset[rows, number] = torch.where(known < begins[theirs], known, SHUT)

    def _from_onset(
        self, number: int, gates: GateTable, opened: Bool[Tensor, " T"], value: Float[Tensor, " T"]
    ) -> Bool[Tensor, " T"]:
        """`opened`, and of onward gates whether each token is the first that opened it, or comes
        after that one; the ledger then holds where that was, and what was read there.

        What an earlier stage decided of each token may be given as well: it gives the same.
        """
        ledger, reads = self._ledger, gates.onward[self._read[number]]
        found = torch.where(reads & opened, self._positions, SHUT)
        onset = ledger.onset[:, number].scatter_reduce(0, self._rows, found, "amin")
        ledger.onset[:, number] = onset
        of_token = onset[self._rows]
        first = reads & (self._positions == of_token)
        ledger.gate_value[self._rows[first], number] = value[first]
        return torch.where(reads, of_token <= self._positions, opened)
