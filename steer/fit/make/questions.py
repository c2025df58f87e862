"""The neutral questions that a vector is made on unless others are given.

They are about everyday things, and none of them asks for a manner of answering: what differs
between two answers to one of them is what the model was told besides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files

from steer.fit.data.pairs import Prompt


def neutral_questions() -> tuple[str, ...]:
    """All shipped questions, in the order of the file."""
    text = files("steer.fit.make").joinpath("questions.txt").read_text("utf-8")
    return tuple(text.splitlines())


def shuffled(prompts: Sequence[Prompt], seed: int) -> tuple[Prompt, ...]:
    """The prompts in an order drawn with `seed`."""
    order = list(prompts)
    random.Random(seed).shuffle(order)
    return tuple(order)
