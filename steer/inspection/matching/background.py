"""What chance is for a cosine with a hidden state.

States fill few of their dimensions, so that a random direction of the whole space is a control that
everything passes. Here random directions vary as states do: each is a sum of the states of other
texts, less their mean, with independent normal weights, and so has their covariance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, TooLarge
from steer.model import HookPoint
from steer.prompts.tokens import text_tokens

PLAIN_TEXTS = (
    "The ferry leaves twice a day, and in winter only when the sea is calm.",
    "Mix the flour with warm water and let the dough rest for an hour.",
    "Her brother repairs old radios in a shed behind the house.",
    "The report lists four causes, of which the second is the least understood.",
    "After the storm nobody could find the key to the library.",
    "A triangle with two equal sides has two equal angles.",
    "He asked whether the meeting could be moved to Thursday morning.",
    "Rice, lentils and dried fruit keep for months in a closed jar.",
    "The court decided against the company, which has appealed.",
    "In spring the river rises and the lower road is closed.",
    "Write your name at the top and the date below it.",
    "They sold the piano because the new flat was on the fifth floor.",
)
"""Texts about nothing in particular, where none are given."""

LEAST_STATES = 16
_MOST_TOKENS = 1024


@dataclass(frozen=True)
class Background:
    """States of other texts at one hook point, `[n, width]` float64; `mean` is theirs."""

    states: Float[Tensor, "n width"]

    @property
    def mean(self) -> Float[Tensor, " width"]:
        return self.states.mean(0)

    def directions(self, count: int, seed: int) -> Float[Tensor, "count width"]:
        """Random directions of length one with the covariance of the states."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(count, len(self.states), generator=generator, dtype=torch.float64)
        drawn = weights @ (self.states - self.mean)
        unit: Tensor = drawn / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return unit


def backgrounds(
    engine: Engine, texts: Sequence[str], points: Sequence[HookPoint]
) -> Mapping[HookPoint, Background]:
    """The states of all tokens of `texts` but each first one, whose state is like no other's.

    Raises `SpecError` (`too_few_texts`) for too few tokens, `TooLarge` (`too_large`) for too many.
    """
    prompts = [text_tokens(engine.tokenizer, text) for text in texts]
    count = sum(max(len(prompt) - 1, 0) for prompt in prompts)
    if count < LEAST_STATES:
        raise SpecError(
            f"the background has {count} tokens beside the first of each text, and chance is told "
            f"from {LEAST_STATES} or more: give more texts, or none for plain ones",
            param="/background",
            code="too_few_texts",
        )
    if count > _MOST_TOKENS:
        raise TooLarge(
            f"the background has {count} tokens, more than {_MOST_TOKENS:,}: give fewer texts",
            param="/background",
            code="too_large",
        )
    captured = engine.capture(CaptureRequest(prompts, tuple(points)))
    return {
        point: Background(torch.cat([one.states[point][1:] for one in captured]).double())
        for point in points
    }
