"""The bodies of chat and plain completion requests.

A field that is not implemented is refused by name. Fields of OpenAI's API that cannot change the
answer (`user`, `metadata`, …) are accepted; others are accepted only with their neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steer.errors import Unsupported, pointer
from steer.spec import SteeringSpec, parse_spec
from steer_server.generation.inspect_spec import InspectSpec

MAX_SEED = 2**63 - 1
MAX_STOPS = 4
MAX_STOP_TOKENS = 256
MAX_PROMPTS = 64


def _spec(value: Any) -> SteeringSpec | None:
    # Parsed here, and not by the request's own model, for errors that know about specs.
    if value is None or isinstance(value, SteeringSpec):
        return value
    if not isinstance(value, dict):
        raise ValueError("'steering' is an object with a list 'interventions'")
    return parse_spec(value, at="/steering")


def _stops(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _text_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise PydanticCustomError(
                "unsupported_content",
                "part {place} of the message is {kind}: this model reads text parts only",
                {"place": place, "kind": repr(kind)},
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f'part {place} must be {{"type": "text", "text": "…"}}')
        texts.append(part["text"])
    return "".join(texts)


def _prompts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [value]
    return value


def _unicode(value: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character and which no tokenizer reads.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds an unpaired surrogate, which is no character") from None
    return value


Spec = Annotated[SteeringSpec | None, BeforeValidator(_spec)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True)]
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    BeforeValidator(_stops, json_schema_input_type=str | list[str] | None),
    Field(max_length=MAX_STOPS),
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenId = Annotated[int, Field(strict=True, ge=0)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the token counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class AddedFields(BaseModel):
    """What Steer adds to a request for a completion, on any engine's server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steering: Spec = None
    receipt: Literal["basic", "full"] = "basic"
    compare: bool = False
    inspect: InspectSpec | None = None

    def check_stream(self, stream: bool | None) -> None:
        """Raises `Unsupported` for what only a whole response can carry."""
        for field in ("compare", "inspect"):
            if stream and getattr(self, field):
                raise Unsupported(
                    f"{field!r} cannot be streamed: send the request without 'stream'",
                    param=f"/{field}",
                    code="unsupported_parameter",
                )


class GenerationFields(AddedFields):
    """What chat and plain completions have in common."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "store": (False,),
    }
    """Fields known to OpenAI's API, with the values that ask for nothing special."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Count, Field(ge=1)] | None = None
    seed: Annotated[Count, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    n: Annotated[Count, Field(ge=1)] | None = None
    stop: Stops = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name not in cls.neutral:
                kept[name] = value
            elif value is not None and value not in cls.neutral[name]:
                allowed = ", ".join(repr(item) for item in cls.neutral[name])
                only = f" (only {allowed} is accepted)" if allowed else ""
                raise Unsupported(
                    f"{name!r} is not supported here: leave it out{only}",
                    param=pointer(name),
                    code="unsupported_parameter",
                )
        return kept

    @model_validator(mode="after")
    def _check(self) -> GenerationFields:
        self.check_stream(self.stream)
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_request", "'stream_options' is only allowed with 'stream': true"
            )
        return self


class ChatMessage(BaseModel):
    """One turn; `content` is text, or a list of text parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_text_parts, json_schema_input_type=str | list[dict[str, str]]),
        AfterValidator(_unicode),
    ]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        # An assistant message of an earlier response comes back with its unused fields.
        unused = (
            *("refusal", "audio", "tool_calls", "function_call", "annotations", "name"),
            *("reasoning", "reasoning_content"),
        )
        if not isinstance(data, dict):
            return data
        for name in unused:
            if data.get(name):
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "{name} in a message is not supported: leave it out",
                    {"name": repr(name)},
                )
        return {name: value for name, value in data.items() if name not in unused}


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    neutral = {
        **GenerationFields.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "moderation": (),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "web_search_options": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
    }

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, JsonValue] | None = None
    reasoning_effort: Effort | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Count, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None: to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log-probabilities to report for each token; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' disagree: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    neutral = {
        **GenerationFields.neutral,
        "best_of": (1,),
        "echo": (False,),
        "suffix": (),
    }

    prompt: Annotated[
        tuple[Annotated[str, AfterValidator(_unicode)] | TokenIds, ...],
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
    add_special_tokens: bool = True
    logprobs: Annotated[Count, Field(ge=0, le=5)] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; OpenAI's default for plain completions is 16."""
        return self.max_tokens or 16

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
