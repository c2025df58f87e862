"""The bodies of chat and plain completion requests.

A field that is not implemented is refused by name, unless it has a neutral value
(`neutral_values`). Fields of OpenAI's API that cannot change the answer (`user`, `metadata`, …) are
accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steer.artefacts.arming import ArmedDetectors
from steer.errors import SteerError, Unsupported
from steer.readouts.spec import ReadoutSpec
from steer.spec import SteeringSpec
from steer_server.generation.answer_format import ResponseFormat
from steer_server.generation.field_types import (
    MAX_SEED,
    MAX_STOP_TOKENS,
    Alternatives,
    Count,
    Finite,
    LogitBias,
    Penalty,
    Stops,
    TokenId,
    TopK,
)
from steer_server.generation.inspection.inspect_spec import InspectSpec
from steer_server.generation.kept_specs import spec_of
from steer_server.generation.neutral_values import (
    CHAT,
    COMPLETION,
    GENERATION,
    Neutral,
    without_neutral,
    without_nulls,
)
from steer_server.generation.text import TextRules

MAX_PROMPTS = 64

UsageOn = Literal["none", "last", "every"]


def _spec(value: Any) -> SteeringSpec | None:
    # Parsed here, and not by the request's own model, for errors that know about specs.
    if value is None or isinstance(value, SteeringSpec):
        return value
    if not isinstance(value, dict):
        raise ValueError("'steering' is an object with a list 'interventions'")
    return spec_of(value, at="/steering")


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


Unicode = Annotated[str, AfterValidator(_unicode)]
Spec = Annotated[SteeringSpec | None, BeforeValidator(_spec)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenIds = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=0)], ...],
    Field(min_length=1, max_length=1 << 20, fail_fast=True),
]
"""A prompt; not `TokenId`, because prompts are long and every check of an item costs."""


def not_streamed(field: str) -> Unsupported:
    """For a field that only a whole response can carry."""
    return Unsupported(
        f"{field!r} cannot be streamed here: send the request without 'stream'",
        param=f"/{field}",
        code="unsupported_parameter",
    )


def _inspection(value: Any) -> str:
    """Which of the two things `inspect` asks for; by its fields, and without any the older one."""
    if isinstance(value, dict):
        return "read-outs" if ReadoutSpec.model_fields.keys() & value.keys() else "a lens"
    return "read-outs" if isinstance(value, ReadoutSpec) else "a lens"


Inspect = Annotated[
    Annotated[InspectSpec, Tag("a lens")] | Annotated[ReadoutSpec, Tag("read-outs")],
    Discriminator(_inspection),
]
"""A lens over the prompt (`InspectSpec`), or read-outs of the tokens."""


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the token counts, and vLLM's `continuous_usage_stats`
    beside it those so far to every chunk. There is no obfuscation here, which
    `include_obfuscation` cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class AddedFields(BaseModel):
    """What Steer adds to a request for a completion, on any engine's server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steering: Spec = None
    receipt: Literal["basic", "full"] = "basic"
    compare: StrictBool = False
    inspect: Inspect | None = None
    detectors: ArmedDetectors = ()

    @property
    def prompt_lens(self) -> InspectSpec | None:
        """The lens that the prompt is read through when it has been answered."""
        return self.inspect if isinstance(self.inspect, InspectSpec) else None

    @property
    def readouts(self) -> ReadoutSpec | None:
        """What is read of each token while it is answered."""
        return self.inspect if isinstance(self.inspect, ReadoutSpec) else None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return without_nulls(data) if isinstance(data, dict) else data

    streams_added: ClassVar[bool] = True
    """Whether the route's stream has room for read-outs and unsteered choices."""

    def check_stream(self, stream: bool | None) -> None:
        """Raises `Unsupported` for what only a whole response can carry."""
        whole = {"compare": self.compare, "inspect": self.inspect is not None}
        if self.streams_added:
            whole = {"inspect": self.prompt_lens is not None}
        for field in (name for name, asked in whole.items() if asked):
            if stream:
                raise not_streamed(field)


class SamplingFields(AddedFields):
    """How tokens are chosen and become text, on every route that generates."""

    format_at: ClassVar[str] = "/response_format"
    """Where the form of the answer stands."""
    neutral: ClassVar[Neutral] = GENERATION
    """Fields that are not implemented, with the values that ask for nothing."""

    model: Annotated[str, Field(min_length=1)]
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: TopK = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] = 1.0
    logit_bias: LogitBias = ()
    seed: Annotated[Count, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Stops = ()
    stop_token_ids: Annotated[
        tuple[TokenId, ...], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)
    ] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[Count, Field(ge=0)] = 0
    skip_special_tokens: bool = True
    stream: StrictBool | None = None
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return 1

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None: to the end of the context."""
        return None

    @property
    def alternatives(self) -> int | None:
        """How many log-probabilities to report for each token; None: none at all."""
        return None

    @property
    def schema_text(self) -> str | None:
        """The schema of the JSON that an answer is, as JSON text; None: any text."""
        return None

    @property
    def text_rules(self) -> TextRules:
        """What of the tokens becomes text."""
        return TextRules(
            stops=self.stop,
            keep_stop=self.include_stop_str_in_output,
            min_tokens=self.min_tokens,
            special=not self.skip_special_tokens,
        )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        return without_neutral(data, cls.neutral) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check(self) -> SamplingFields:
        self.check_stream(self.stream)
        if self.limit is not None and self.min_tokens > self.limit:
            raise SteerError(
                f"'min_tokens' is {self.min_tokens} and at most {self.limit} tokens are "
                "generated: lower it, or raise the limit",
                param="/min_tokens",
                code="invalid_value",
            )
        return self


class GenerationFields(SamplingFields):
    """What chat and plain completions have in common."""

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    n: Annotated[Count, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def schema_text(self) -> str | None:
        return None if self.response_format is None else self.response_format.schema_text

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def streamed_usage(self) -> UsageOn:
        """Which chunks of a stream carry token counts."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "none"
        return "every" if options.continuous_usage_stats else "last"

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_request", "'stream_options' is only allowed with 'stream': true"
            )
        return self


class TextPart(BaseModel):
    """A part of a message, for the schema; `_text_parts` reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; `content` is text, or a list of text parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_text_parts, json_schema_input_type=str | list[TextPart]),
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
        return {name: value for name, value in without_nulls(data).items() if name not in unused}


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    neutral = CHAT

    messages: Annotated[
        tuple[ChatMessage, ...], Field(min_length=1, max_length=4096, fail_fast=True)
    ]
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False
    add_special_tokens: StrictBool = False
    chat_template_kwargs: dict[str, JsonValue] | None = None
    reasoning_effort: Effort | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Count, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' disagree: give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    neutral = COMPLETION

    prompt: Annotated[
        tuple[Annotated[str, AfterValidator(_unicode)] | TokenIds, ...],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        BeforeValidator(
            _prompts,
            json_schema_input_type=str
            | TokenIds
            | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        ),
    ]
    add_special_tokens: bool = True
    max_tokens: Annotated[Count, Field(ge=0)] | None = None
    logprobs: Alternatives = None
    echo: bool = False
    best_of: Count | None = None

    @property
    def limit(self) -> int:
        """The most tokens to generate; OpenAI's default for plain completions is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise Unsupported(
                "'best_of' is not supported here: leave it out (only the number of choices, "
                f"{self.choices}, is accepted)",
                param="/best_of",
                code="unsupported_parameter",
            )
        return self
