"""What POST /v1/responses answers: OpenAI's response object, as far as it is used here."""

from __future__ import annotations

from typing import Any, Literal

from openai.types.chat import ChatCompletionTokenLogprob
from pydantic import BaseModel, Field

from steer_server.generation.generation import Answer, Generation
from steer_server.generation.responses.request import ResponsesRequest
from steer_server.generation.token_logprobs import token_logprobs

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """The one part of an answer's message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    logprobs: list[ChatCompletionTokenLogprob] = Field(default_factory=list)


class OutputMessage(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText] = Field(default_factory=list)


class IncompleteDetails(BaseModel):
    """Why an answer ends before its end."""

    reason: Literal["max_output_tokens", "content_filter"] = "max_output_tokens"


class InputTokensDetails(BaseModel):
    """Nothing of a prompt is read from a cache here."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Reasoning is not told from the answer here."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens of prompt and answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class SteeredResponse(BaseModel):
    """OpenAI's response, with the receipt in `steering`, and in `default` the message of the
    unsteered model where the request has `"compare": true`."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputMessage] = Field(default_factory=list)
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none"] = "none"
    tools: list[dict[str, Any]] = Field(default_factory=list)
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    user: str | None = None
    steering: dict[str, Any] | None = None
    default: list[OutputMessage] | None = None
    inspect: dict[str, Any] | None = None
    detections: list[dict[str, Any]] | None = None


def response_of(run: Generation, body: ResponsesRequest, **fields: Any) -> SteeredResponse:
    """The response of a request; `fields` say how far it is."""
    return SteeredResponse(
        id=run.id,
        created_at=run.created,
        model=run.model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        text={"format": _format(body)},
        user=body.user,
        **fields,
    )


def _format(body: ResponsesRequest) -> dict[str, Any]:
    form = None if body.text is None else body.text.format
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def ended(run: Generation, answer: Answer) -> dict[str, Any]:
    """The fields of a response that ends in `answer`."""
    prompt = sum(map(len, run.prompts))
    return {
        "status": status_of(answer),
        "incomplete_details": details_of(answer),
        "usage": ResponseUsage(
            input_tokens=prompt, output_tokens=answer.tokens, total_tokens=prompt + answer.tokens
        ),
    }


def message_of(tokenizer: Any, run: Generation, answer: Answer) -> OutputMessage:
    """The message of a whole answer."""
    logprobs = token_logprobs(tokenizer, answer.logprobs).content or []
    part = OutputText(text=answer.text, logprobs=logprobs)
    return OutputMessage(id=message_id(run), status=status_of(answer), content=[part])


def status_of(answer: Answer) -> Status:
    """Whether the answer came to its end."""
    return "completed" if details_of(answer) is None else "incomplete"


def details_of(answer: Answer) -> IncompleteDetails | None:
    """Why the answer did not come to its end; None where it did."""
    if answer.finish == "content_filter":
        return IncompleteDetails(reason="content_filter")
    return IncompleteDetails() if answer.finish == "length" else None


def message_id(run: Generation) -> str:
    """The id of the one message of a response."""
    return run.id.replace("resp", "msg", 1)


def as_json(part: BaseModel) -> dict[str, Any]:
    """A part of an answer as JSON; Steer's own fields are there where they say something."""
    found = part.model_dump(mode="json")
    absent = [
        name
        for name in ("steering", "default", "inspect", "detections")
        if found.get(name, 0) is None
    ]
    return {name: value for name, value in found.items() if name not in absent}
