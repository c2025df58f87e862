"""Where a model listens: the place of an instruction that changes its answers most."""

from __future__ import annotations

from collections.abc import Sequence

from steer.fit.data.instruction import Placement
from steer.fit.data.pairs import Prompt
from steer.fit.make.asking import Interview
from steer.fit.make.obedience import readings

TRIED: tuple[Placement, ...] = ("system", "after")
QUESTIONS = 6


def best_place(interview: Interview, prompts: Sequence[Prompt]) -> Placement:
    """The place of `TRIED` at which the answers of the told model and of the opposed one differ
    most: by the mean of how much likelier each finds its own answers than the other does, in nats
    a token. It asks the first `QUESTIONS` of `prompts`."""
    questions = prompts[:QUESTIONS]
    return max(TRIED, key=lambda place: _distance(interview.at(place), questions))


def steps(prompts: int) -> int:
    """How much `best_place` tells the interview's `progress` of."""
    return 2 * len(TRIED) * min(QUESTIONS, prompts)


def _distance(interview: Interview, questions: Sequence[Prompt]) -> float:
    told, opposed = interview.answers(
        [interview.told(one) for one in questions], [interview.opposed(one) for one in questions]
    )
    asked = interview.asked(questions)
    read = readings(interview.engine, [*asked, *asked], [one.tokens for one in (*told, *opposed)])
    own = [one.gain for one in read[: len(asked)] if one is not None]
    others = [one.gain for one in read[len(asked) :] if one is not None]
    return sum(own) / max(len(own), 1) - sum(others) / max(len(others), 1)
