"""Gates of a batch: what they rule is withheld until they open.

A gate reads the residual stream at its own hook point, before anything that it rules. One of scope
"token" is decided for each token anew; one of scope "prompt" is decided on the last prompt token
and held for the request, in the ledger.

T tokens, P rules.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.batch.ledger import Ledger
from steer.batch.tables import GateTable, Tables
from steer.batch.token_slots import GatedTokens
from steer.edits import gate_open
from steer.model import HookPoint


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
                opened = self._decided(number, gates, x)
                selected = self._selected[number]
                ruled = gates.held[selected] | gates.per_token[selected]
                slots[number] = torch.where(ruled, torch.where(opened, selected, 0), slots[number])

    def _decided(
        self, number: int, gates: GateTable, x: Float[Tensor, "T d"]
    ) -> Bool[Tensor, " T"]:
        """Whether the gate that rules each token is open; what is decided for a request is kept."""
        read = self._read[number]
        opened, value = gate_open(
            x, gates.direction[read], gates.cosine[read], gates.above[read], gates.below[read]
        )
        deciding = gates.held[read] & self._deciding
        if bool(deciding.any()):
            rows = self._rows[deciding]
            self._ledger.gate_open[rows, number] = opened[deciding]
            self._ledger.gate_value[rows, number] = value[deciding]
        # Tokens after the last prompt token may be computed in the pass that decides.
        held = gates.held[self._selected[number]]
        return torch.where(held, self._ledger.gate_open[self._rows, number], opened)
