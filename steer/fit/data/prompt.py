"""Which of a prompt's tokens a state is read at. The prompts themselves are `steer.prompts`'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from steer.errors import SteerError
from steer.prompts.forms import Marked, Messages, Prompt, parse_prompt, prompt_json
from steer.prompts.places import spans_by_decoding, tokens_within
from steer.prompts.tokens import render

__all__ = [
    "POSITION_NAMES",
    "Marked",
    "Messages",
    "Positions",
    "Prompt",
    "parse_prompt",
    "prompt_json",
    "read_positions",
    "render",
    "subject_position",
]

Positions: TypeAlias = Literal["last", "mean", "response", "subject"] | int
"""Which token's state stands for a prompt: the last one; the mean over all; the mean over the
response; the last token of the subject; or an index, negative from the end."""
POSITION_NAMES = ("last", "mean", "response", "subject")


def read_positions(tokenizer: Any, prompt: Prompt, tokens: Sequence[int], at: Positions) -> range:
    """The positions in `tokens` (what `render` gave) whose mean state stands for `prompt`.

    Raises `SteerError` where the prompt has no such place.
    """
    if at == "mean":
        return range(len(tokens))
    if at == "response":
        return range(_first_response(tokenizer, prompt, tokens), len(tokens))
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
    tokens = render(tokenizer, prompt.prompt)
    text = str(tokenizer.decode(tokens, skip_special_tokens=False))
    start = text.rfind(prompt.subject)
    if start < 0:
        raise SteerError(
            f"the subject {prompt.subject!r} does not occur in its prompt", code="no_subject"
        )
    spans = spans_by_decoding(tokenizer, tokens, text)
    return tokens_within(spans, (start, start + len(prompt.subject)))[-1]


def _first_response(tokenizer: Any, prompt: Prompt, tokens: Sequence[int]) -> int:
    if isinstance(prompt, Marked) and prompt.response:
        return len(render(tokenizer, prompt.prompt))
    messages = prompt.prompt if isinstance(prompt, Marked) else prompt
    if not isinstance(messages, str) and len(messages) > 1 and messages[-1]["role"] == "assistant":
        asked = render(tokenizer, messages[:-1])
        if list(tokens[: len(asked)]) == asked and len(asked) < len(tokens):
            return len(asked)
    raise SteerError(
        "the state of a response was asked for and a prompt has none: end the messages with the "
        'assistant\'s, or give {"prompt": …, "response": …}',
        code="no_response",
    )
