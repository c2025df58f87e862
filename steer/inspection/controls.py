"""What a target prompt would say without the state that is read (2509.13316).

A reading speaks of a state only where it says what neither the target prompt, nor the text that the
state comes from, nor any other state of that text makes the model say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from jaxtyping import Float
from pydantic import AfterValidator, Field
from torch import Tensor

from steer.engines.base import Engine
from steer.prompts import EncodedPrompt, answer_text, inner_tokens

Control: TypeAlias = Literal["text", "shuffled"]
CONTROLS: tuple[Control, ...] = ("text", "shuffled")


def _each_once(given: tuple[Control, ...]) -> tuple[Control, ...]:
    return tuple(one for one in CONTROLS if one in given)


ControlChoice: TypeAlias = Annotated[
    tuple[Control, ...], Field(max_length=8, fail_fast=True), AfterValidator(_each_once)
]


def text_target(
    engine: Engine,
    target: EncodedPrompt,
    place: int,
    source: EncodedPrompt,
    position: int,
    max_tokens: int = 0,
) -> tuple[int, ...]:
    """The target prompt with the source's text, up to `position`, in the place of the token that a
    state would be put at; of a text that leaves no room for `max_tokens` more, its end.

    Special tokens, such as the marks of a chat, are no text.
    """
    before, after = target.ids[:place], target.ids[place + 1 :]
    read = source.ids[: position + 1]
    text = answer_text(engine.tokenizer, read)
    if target.tokens[place].startswith(" ") and text:
        text = " " + text.lstrip()
    ids = tuple(_inside(engine.tokenizer, text, first=not before)) or read
    room = engine.info.max_length - len(before) - len(after) - max_tokens
    return (*before, *ids[-max(room, 1) :], *after)


def _inside(tokenizer: Any, text: str, *, first: bool) -> Sequence[int]:
    return tokenizer.encode(text) if first else inner_tokens(tokenizer, text)


def other_positions(positions: Sequence[int], length: int) -> dict[int, int]:
    """For each position another of the prompt's `length`, drawn by chance and always alike.

    The first one is taken only where there is no other: in most models its state is like no other
    token's, whatever the text. A prompt of one token has none.
    """
    draw = random.Random(length)
    found = {}
    for position in positions:
        others = [n for n in range(1, length) if n != position] or [n for n in (0,) if n < position]
        if others:
            found[position] = draw.choice(others)
    return found


def of_length(
    state: Float[Tensor, " width"], like: Float[Tensor, " width"]
) -> Float[Tensor, " width"]:
    """`state`, made as long as `like`."""
    scaled: Tensor = state * (like.norm() / state.norm().clamp_min(1e-12))
    return scaled
