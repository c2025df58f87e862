"""How much of their edits the tokens of a pass get, and those of the passes that carry it on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steer.batch.requests import Span
from steer.plan.selection import Lines, Ramp


class Ramps:
    """The ramps of a pass over T tokens, whose longest plan has P rules.

    `factors` `[P, T]` multiply what edits change, 1 where no ramp says otherwise.
    """

    def __init__(self, ramped: Sequence[Span], shape: tuple[int, ...]) -> None:
        self.factors = np.ones(shape, dtype=np.float32)
        for span in ramped:
            mine = span.request.factors(span.positions)
            assert mine is not None
            self.factors[: len(mine), span.place] = mine
        # Whoever made the spans may move their positions on by the time that this is carried on.
        self._begun = [(span, int(span.positions[0])) for span in ramped]
        self._tokens: _Tokens | None = None

    @staticmethod
    def of(spans: Sequence[Span], shape: tuple[int, ...]) -> Ramps | None:
        """Those of `spans`; None where no plan among them has any."""
        ramped = [one for one in spans if one.request.plan is not None and one.request.plan.ramped]
        return Ramps(ramped, shape) if ramped else None

    def carry_on(self) -> bool:
        """Takes the token of each request a position further; whether `factors` are others now.

        Assumes: one token for each request.
        """
        if self._tokens is None:
            self._tokens = _Tokens(self._begun)
        if self._tokens.over:
            return False
        self._tokens.move(self.factors)
        return True


class _Tokens:
    """Every token that has a ramp in a rule, and the line of the ramp on which it lies: all are
    moved together, however many there are."""

    def __init__(self, begun: Sequence[tuple[Span, int]]) -> None:
        """Each span and the position of its token."""
        found = [
            (number, span.offset, ramp, position - ramp.start(span.request.prompt_length))
            for span, position in begun
            for number, one in enumerate(span.request.rules)
            if (ramp := one.selection.ramp) is not None
        ]
        rules, places, ramps, numbers = zip(*found, strict=True)
        self._rules, self._places, self._numbers = map(np.array, (rules, places, numbers))
        first: dict[Ramp, int] = {}
        for ramp in ramps:
            first.setdefault(ramp, sum(len(one.points) + 1 for one in first))
        self._lines = Lines(*map(np.concatenate, zip(*(one.lines for one in first), strict=True)))
        self._on = np.array(
            [
                first[ramp] + ramp.lines.at(np.array([number]))[0]
                for ramp, number in zip(ramps, numbers, strict=True)
            ]
        )

    @property
    def over(self) -> bool:
        """Whether every token lies behind the last point of its ramp."""
        return not np.isfinite(self._lines.ends[self._on]).any()

    def move(self, factors: NDArray[np.float32]) -> None:
        """Takes each token one further, and writes down its factor."""
        self._numbers += 1
        # Points are whole tokens, so that no line is passed over.
        self._on += self._numbers >= self._lines.ends[self._on]
        factors[self._rules, self._places] = self._lines.factors(self._on, self._numbers)
