"""Conditions on the texts that stand before a token, as `Where` has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steer.plan.texts.automaton import TokenAutomaton
from steer.plan.texts.trace import TokenTrace

TextRelation: TypeAlias = Literal["after", "before", "between", "outside"]
RELATIONS: tuple[TextRelation, ...] = ("after", "before", "between", "outside")


@dataclass(frozen=True)
class TextCondition:
    """How selected tokens stand to the texts of `automata`: one for each text, or for each pair."""

    relation: TextRelation
    automata: tuple[TokenAutomaton, ...]

    def mask(self, trace: TokenTrace, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the tokens at `positions` stand so."""
        inside = np.zeros(len(positions), dtype=bool)
        maybe = inside.copy()
        for automaton in self.automata:
            inside |= trace.before(automaton, positions) >= automaton.inside
            if self.relation == "outside":
                # The opening itself, and what may be the beginning of one.
                maybe |= trace.after(automaton, positions) > 0
        if self.relation in ("after", "between"):
            return inside
        return ~(inside | maybe)
