"""Questions as they are asked: plainly, with an instruction, and with its opposite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from steer.engines.base import Engine, SamplingParams
from steer.fit.data.instruction import Placement, Telling
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under
from steer.prompts import render

Tokens: TypeAlias = tuple[int, ...]

NEUTRAL = "Answer as you usually would."
"""What the other side of the contrast is told where no opposite is given: that something is said at
all, and where, is then no part of what differs."""


@dataclass(frozen=True)
class Asked:
    """One question as tokens: as it is, with the instruction, and with its opposite."""

    plain: Tokens
    told: Tokens
    opposed: Tokens


@dataclass(frozen=True)
class Interview:
    """How an engine is asked: what it is told, where, and how its answers are sampled."""

    engine: Engine
    instruction: str
    opposite: str
    sampling: SamplingParams
    place: Placement = "system"
    progress: Progress | None = None

    def at(self, place: Placement) -> Interview:
        return replace(self, place=place)

    @property
    def told(self) -> Telling:
        return Telling(self.instruction, self.place)

    @property
    def opposed(self) -> Telling:
        return Telling(self.opposite or NEUTRAL, self.place)

    def asked(self, prompts: Sequence[Prompt]) -> list[Asked]:
        """The questions in their three forms."""
        tokenizer = self.engine.tokenizer
        return [
            Asked(
                tuple(render(tokenizer, one)),
                tuple(render(tokenizer, self.told(one))),
                tuple(render(tokenizer, self.opposed(one))),
            )
            for one in prompts
        ]

    def answers(self, *sides: Sequence[Prompt]) -> list[tuple[Answer, ...]]:
        """The unsteered answers to each of `sides`, unscored, in shared batches."""
        return answers_under(
            self.engine,
            sides,
            [None] * len(sides),
            sampling=self.sampling,
            group=GROUP,
            progress=self.progress,
        )
