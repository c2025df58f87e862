"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from steer.errors import Unsupported
from steer_server.generation.answer_format import TextFormat
from steer_server.generation.field_types import Count
from steer_server.generation.neutral_values import RESPONSES, without_nulls
from steer_server.generation.request_models import ChatMessage, SamplingFields, Unicode

_TEXTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"
"""The entry of `include` that asks for log-probabilities."""


def _items(value: Any) -> Any:
    """The turns of `input`, each in the chat's form."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return [_turn(item) for item in value] if isinstance(value, list) else value


def _turn(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if item.get("type") not in (None, "message"):
        raise PydanticCustomError(
            "unsupported_content",
            "an item {kind} in 'input' is not supported: send messages alone",
            {"kind": repr(item["type"])[:60]},
        )
    # What an answer of this route holds comes back with the conversation.
    own = ("type", "id", "status", "phase")
    turn = {name: value for name, value in item.items() if name not in own}
    if isinstance(turn.get("content"), list):
        turn["content"] = [_part(part) for part in turn["content"]]
    return turn


def _part(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in _TEXTS:
        return part
    rest = {name: value for name, value in without_nulls(part).items() if value != []}
    rest.pop("logprobs", None)
    return {**rest, "type": "text"}


class InputPart(BaseModel):
    """A piece of text in a message; `annotations` and `logprobs` are those of an earlier answer."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputMessage(BaseModel):
    """An item of `input`, as clients write it; an earlier answer's `output` has the same form."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ResponsesStreamOptions(BaseModel):
    """Nothing is obfuscated here, whatever is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_obfuscation: bool | None = None


class TextConfig(BaseModel):
    """The answer's form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(SamplingFields):
    """POST /v1/responses. Nothing is stored, whatever `store` says: a conversation is sent whole,
    in `input`."""

    format_at = "/text/format"
    neutral = RESPONSES
    streams_added = False

    input: Annotated[
        tuple[ChatMessage, ...],
        Field(min_length=1, max_length=4096, fail_fast=True),
        BeforeValidator(
            _items,
            json_schema_input_type=str
            | Annotated[list[InputMessage], Field(min_length=1, max_length=4096)],
        ),
    ]
    instructions: Unicode | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    top_logprobs: Annotated[Count, Field(ge=0, le=20)] | None = None
    # There is no reasoning here whose hidden form could be included.
    include: Annotated[
        tuple[Literal["message.output_text.logprobs", "reasoning.encrypted_content"], ...],
        Field(max_length=64),
    ] = ()
    text: TextConfig | None = None
    stream_options: ResponsesStreamOptions | None = None
    previous_response_id: str | None = None

    @property
    def schema_text(self) -> str | None:
        form = None if self.text is None else self.text.format
        return None if form is None else form.schema_text

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or (0 if LOGPROBS in self.include else None)

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation, `instructions` at its head."""
        head = [] if self.instructions is None else [("system", self.instructions)]
        turns = head + [(message.role, message.content) for message in self.input]
        return [{"role": role, "content": content} for role, content in turns]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_reasoning(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("reasoning"), dict):
            return {**data, "reasoning": without_nulls(data["reasoning"])}
        return data

    @model_validator(mode="after")
    def _check_responses(self) -> ResponsesRequest:
        if self.previous_response_id is not None:
            raise Unsupported(
                "'previous_response_id' is not supported here, because answers are not stored: "
                "send the whole conversation in 'input'",
                param="/previous_response_id",
                code="unsupported_parameter",
            )
        return self
