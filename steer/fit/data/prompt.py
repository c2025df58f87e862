"""Which of a prompt's tokens a state is read at. The prompts themselves are `steer.prompts`'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Discriminator, Field, Tag

from steer.errors import SteerError
from steer.prompts.forms import Marked, Messages, Prompt, parse_prompt, prompt_json
from steer.prompts.rendering import answer_range, encoded, render
from steer.spec import Where

__all__ = [
    "POSITION_NAMES",
    "Marked",
    "Messages",
    "PositionName",
    "Positions",
    "Prompt",
    "parse_prompt",
    "positions_json",
    "prompt_json",
    "read_positions",
    "render",
    "response_positions",
    "subject_position",
]

PositionName: TypeAlias = Literal["last", "mean", "response", "subject"]
POSITION_NAMES: tuple[PositionName, ...] = get_args(PositionName)


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "a name"
    return "a selection" if isinstance(value, Mapping | Where) else "an index"


Positions: TypeAlias = Annotated[
    Annotated[PositionName, Tag("a name")]
    | Annotated[int, Field(strict=True), Tag("an index")]
    | Annotated[Where, Tag("a selection")],
    Discriminator(_form),
]
"""Which token's state stands for a prompt: the last one; the mean over all but the first; that over
the response; the last token of the subject; an index, negative from the end; or the mean over those
that a selection names, for which a response is what was generated."""


def positions_json(at: object) -> Any:
    """`at`, a name, an index or a selection, as a card keeps it."""
    return (
        at.model_dump(mode="json", by_alias=True, exclude_none=True)
        if isinstance(at, Where)
        else at
    )


def read_positions(
    tokenizer: Any, prompt: Prompt, tokens: Sequence[int], at: PositionName | int
) -> range:
    """The positions in `tokens` (what `render` gave) that are read of `prompt`; of "mean" all.

    Raises `SteerError` where the prompt has no such place.
    """
    if at == "mean":
        return range(len(tokens))
    if at == "response":
        return response_positions(tokenizer, prompt)
    if at == "subject":
        place = subject_position(tokenizer, prompt)
        return range(place, place + 1)
    index = -1 if at == "last" else at
    if not isinstance(index, int) or not -len(tokens) <= index < len(tokens):
        raise SteerError(
            f"the position {at!r} does not exist in a prompt of {len(tokens)} tokens: give an "
            f"index within it, or one of {', '.join(POSITION_NAMES)}",
            code="position_out_of_range",
        )
    place = index % len(tokens)
    return range(place, place + 1)


def subject_position(tokenizer: Any, prompt: Prompt) -> int:
    """The last token of the subject's last occurrence before the response."""
    if not isinstance(prompt, Marked) or not prompt.subject:
        raise SteerError(
            "a subject's state was asked for and a prompt names none: give it as "
            '{"prompt": …, "subject": "a phrase in it"}',
            code="no_subject",
        )
    asked = encoded(tokenizer, prompt.prompt)
    place = asked.last_token_of(prompt.subject)
    if place is None:
        raise SteerError(
            f"the subject {prompt.subject!r} does not occur in its prompt", code="no_subject"
        )
    return place


def response_positions(tokenizer: Any, prompt: Prompt) -> range:
    """The tokens of the response: of what the assistant said last, without marks and thoughts."""
    found = answer_range(tokenizer, prompt)
    if found:
        return found
    raise SteerError(
        "the state of a response was asked for and a prompt has none: end the messages with the "
        'assistant\'s, or give {"prompt": …, "response": …}',
        code="no_response",
    )
