"""The forms in which prompts are given.

Three families, each as strict as its source asks for:

- `PromptInput`, in requests for inspections: exactly one of text, messages and ids; the roles are
  OpenAI's.
- `PromptParam`, in requests for jobs: text or messages; the roles are whatever the model's chat
  template knows.
- `Prompt`, in data files and in Python: text, messages, or `Marked`, which says what the model is
  made to have said or what the prompt is about.

OpenAI's own request bodies, with their parts and unused fields, are the server's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, model_validator

from steer.errors import FileFormatError
from steer.spec import Index, exactly_one

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A chat: objects with `role` and `content`."""

Place = Annotated[int, Field(strict=True)] | Annotated[str, Field(min_length=1, max_length=4096)]
"""A token position (negative from the end), or a piece of the prompt's text: then the last token
of its last occurrence, where a subject's information gathers."""


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class PromptInput(BaseModel):
    """A prompt, in exactly one of three forms.

    `text` is encoded as it stands, with the tokenizer's own special tokens; `messages` go through
    the model's chat template, which is told the variables of `chat_template_kwargs`; `tokens` are
    ids.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra=exactly_one("text", "messages", "tokens"),
    )

    text: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None
    messages: (
        Annotated[tuple[Message, ...], Field(min_length=1, max_length=4096, fail_fast=True)] | None
    ) = None
    tokens: (
        Annotated[tuple[Index, ...], Field(min_length=1, max_length=1 << 20, fail_fast=True)] | None
    ) = None
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> PromptInput:
        given = [name for name in ("text", "messages", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "a prompt is given as exactly one of 'text', 'messages' and 'tokens'; "
                f"got {' and '.join(given) or 'none of them'}"
            )
        if self.chat_template_kwargs and self.messages is None:
            raise ValueError("'chat_template_kwargs' are for a prompt that is given as 'messages'")
        return self


class MessageParam(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Chat: TypeAlias = Annotated[
    tuple[MessageParam, ...], Field(min_length=1, max_length=4096, fail_fast=True)
]


class MarkedParam(BaseModel):
    """A prompt with the response that follows it, or with the phrase it is about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text | Chat
    response: str = ""
    subject: str = ""


PromptParam: TypeAlias = Text | Chat | MarkedParam
"""A prompt as clients send it with a job."""


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
"""A text, taken as it is; a chat; or either with marks."""


def prompt_of(param: PromptParam) -> Prompt:
    """The prompt as fitting takes it."""
    if isinstance(param, str):
        return param
    if isinstance(param, MarkedParam):
        return Marked(_plain(param.prompt), param.response, param.subject)
    return _plain(param)


def _plain(param: str | tuple[MessageParam, ...]) -> str | Messages:
    return param if isinstance(param, str) else [message.model_dump() for message in param]


def parse_prompt(value: Any, at: str, what: str, code: str = "invalid_pairs") -> Prompt:
    """`value` as a prompt: a text, messages, or an object
    `{"prompt": TEXT OR MESSAGES, "response": TEXT, "subject": TEXT}` of which `response` and
    `subject` may be left out. Raises `FileFormatError` (`code`) that says where it stands."""
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
