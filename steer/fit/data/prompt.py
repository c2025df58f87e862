"""Prompts as data gives them, as tokens, and where in them a state is read.

A prompt is a text, taken as it is; a list of chat messages, which the model's own chat template
renders; or an object `{"prompt": TEXT OR MESSAGES, "response": TEXT, "subject": TEXT}` of which
`response` (what the model is made to have said) and `subject` (a phrase of the prompt) may be
left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from steer.errors import FileFormatError, SteerError

Messages: TypeAlias = Sequence[Mapping[str, str]]
Positions: TypeAlias = Literal["last", "mean", "response", "subject"] | int
"""Which token's state stands for a prompt: the last one; the mean over all; the mean over the
response; the last token of the subject; or an index, negative from the end."""
POSITION_NAMES = ("last", "mean", "response", "subject")


@dataclass(frozen=True)
class Marked:
    """A prompt with the response that follows it, or with the phrase it is about."""

    prompt: str | Messages
    response: str = ""
    subject: str = ""

    def as_json(self) -> dict[str, Any]:
        marks = {"response": self.response, "subject": self.subject}
        return {"prompt": self.prompt, **{key: text for key, text in marks.items() if text}}


Prompt: TypeAlias = str | Messages | Marked


def parse_prompt(value: Any, at: str, what: str, code: str = "invalid_pairs") -> Prompt:
    """`value` as a prompt; raises `FileFormatError` that says where it stands."""
    if isinstance(value, dict):
        return _marked(value, at, what, code)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value
    raise FileFormatError(
        f"{at}: {what} must be a text, or a list of messages with 'role' and 'content', or an "
        "object with 'prompt' and 'response' or 'subject'",
        code=code,
    )


def prompt_json(prompt: Prompt) -> Any:
    """The JSON value that `parse_prompt` reads `prompt` from."""
    return prompt.as_json() if isinstance(prompt, Marked) else prompt


def render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """`prompt` as tokens, with its response where it has one.

    Messages go through the chat template, with the opening of an answer unless the last message is
    the assistant's. Raises `SteerError` where the template refuses them.
    """
    if isinstance(prompt, Marked):
        asked = render(tokenizer, prompt.prompt)
        if not prompt.response:
            return asked
        return asked + list(tokenizer.encode(prompt.response, add_special_tokens=False))
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    if getattr(tokenizer, "chat_template", None) is None:
        raise SteerError(
            "the model's tokenizer has no chat template: give prompts as plain texts",
            code="no_chat_template",
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in prompt],
            tokenize=False,
            add_generation_prompt=prompt[-1]["role"] != "assistant",
        )
    except Exception as error:
        # Templates are programs that come with the model; whatever they raise is about the data.
        raise SteerError(
            f"the model's chat template refuses these messages: {error}", code="invalid_messages"
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


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
    start = str(tokenizer.decode(tokens)).rfind(prompt.subject)
    if start < 0:
        raise SteerError(
            f"the subject {prompt.subject!r} does not occur in its prompt", code="no_subject"
        )
    # Texts of the first n tokens only grow: the first that reaches the end of the subject holds it.
    end = start + len(prompt.subject)
    return next(n for n in range(len(tokens)) if len(tokenizer.decode(tokens[: n + 1])) >= end)


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


def _marked(value: dict[str, Any], at: str, what: str, code: str) -> Marked:
    marks = {key: value[key] for key in ("response", "subject") if key in value}
    known = set(value) <= {"prompt", "response", "subject"} and "prompt" in value
    texts = all(isinstance(text, str) and text for text in marks.values())
    if not known or not texts or isinstance(value["prompt"], dict):
        raise FileFormatError(
            f"{at}: {what} as an object has 'prompt' (a text or messages) and, as texts, "
            f"'response' or 'subject' or both; got the keys {sorted(value)!r}",
            code=code,
        )
    inner = parse_prompt(value["prompt"], at, f"{what}'s prompt", code)
    assert not isinstance(inner, Marked)
    return Marked(inner, **marks)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
