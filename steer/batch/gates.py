"""Gates of a batch: what they rule is withheld until they open.

A gate reads the residual stream at its own hook point, before anything that it rules. One of scope
"token" is decided for each token anew; one of scope "prompt" is decided on the last prompt token
and held for the request, in the ledger.

Where a model runs in several stages, a gate may rule layers of a stage behind the one that reads
it. So each stage hands on what was decided up to there (`Decisions`), beside the states.

T tokens, P rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.batch.ledger import Ledger
from steer.batch.tables import MAX_RULES, GateTable, Tables
from steer.batch.token_slots import GatedTokens
from steer.edits import gate_open
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
        ruled = gates.held[selected] | gates.per_token[selected]
        slots[number] = torch.where(ruled, torch.where(opened, selected, 0), slots[number])
        self._decided.append((number, gates, opened, value))
