"""What is asked for when a vector is made, and how the questions are parted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer.engines.base import SamplingParams
from steer.errors import SteerError
from steer.fit.data.instruction import Placement
from steer.fit.data.pairs import Prompt
from steer.fit.make.questions import shuffled
from steer.spec import Site

FITTED, CHOSEN, CHECKED, RUN_OFF = 48, 12, 20, 20
"""Questions that are used at most for fitting, for choosing, for the check, and for choosing again
among the best."""

LEAST = 24


@dataclass(frozen=True)
class Wish:
    """An instruction, and how its vector is made.

    `opposite` is what the other side of the contrast is told; without one, that is a neutral
    sentence. `place` is where the model is told (None: where it listens best). `nulls` are run of
    each kind in the check. Answers have at most `max_tokens` tokens.
    """

    instruction: str
    name: str
    opposite: str = ""
    place: Placement | None = None
    method: str = "diffmean"
    site: Site = "resid_post"
    nulls: int = 7
    max_tokens: int = 32
    temperature: float = 0.7
    seed: int = 0
    description: str = ""
    licence: str = ""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed, logprobs=0
        )


@dataclass(frozen=True)
class QuestionParts:
    """The questions to fit on, to choose on, to check on, and to choose again on among the best;
    no question is in two of them."""

    fitted: tuple[Prompt, ...]
    chosen: tuple[Prompt, ...]
    checked: tuple[Prompt, ...]
    run_off: tuple[Prompt, ...] = ()

    @staticmethod
    def of(prompts: Sequence[Prompt], seed: int) -> QuestionParts:
        """`prompts` in an order drawn with `seed`, in shares of 4, 1 and 2, up to what is used;
        what is then left is for the run-off, up to what that uses.
        Raises `SteerError` (`no_prompts`) for fewer than `LEAST`."""
        if len(prompts) < LEAST:
            raise SteerError(
                f"{len(prompts)} prompts are too few to fit, to choose and to check on: give at "
                f"least {LEAST}",
                code="no_prompts",
                param="/prompts",
            )
        order = shuffled(prompts, seed)
        chosen = min(CHOSEN, len(order) // 7)
        checked = min(CHECKED, 2 * len(order) // 7)
        rest = order[chosen + checked :]
        return QuestionParts(
            rest[:FITTED],
            order[:chosen],
            order[chosen : chosen + checked],
            rest[FITTED : FITTED + RUN_OFF],
        )
