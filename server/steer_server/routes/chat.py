"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from starlette.responses import JSONResponse

from steer_server.generation.added_fields import added_fields
from steer_server.generation.chat_prompt import chat_prompt, chat_prompt_roles
from steer_server.generation.generation import Answer, Generation, Logprobs, answers, prepare
from steer_server.generation.inspection.detectors import headers
from steer_server.generation.request_models import ChatRequest
from steer_server.generation.streaming import Chunk, ChunkForms, events, usage
from steer_server.generation.token_logprobs import token_logprobs
from steer_server.http.content_type import require_json
from steer_server.http.disconnect import EventStream, while_connected
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(
    tags=["generation"], dependencies=[Depends(require_json)], route_class=SteerRoute
)


class SteeredChatCompletion(ChatCompletion):
    """OpenAI's chat completion, with the receipt in `steering`, and in `default` the choices of
    the unsteered model where the request has `"compare": true`."""

    steering: dict[str, Any] | None = None
    default: list[Choice] | None = None
    inspect: dict[str, Any] | None = None
    detections: list[dict[str, Any]] | None = None


@router.post("/v1/chat/completions", responses={200: {"model": SteeredChatCompletion}})
async def create_chat_completion(
    body: ChatRequest, request: Request, serving: ServingDep
) -> Response:
    """Answers a chat, steered as the request or its profile says."""
    run = await to_thread.run_sync(_prepared, serving, body)
    if body.stream:
        return EventStream(
            events(serving, run, _forms(serving, run, body), usage_on=body.streamed_usage)
        )
    return await while_connected(request, lambda: _whole(serving, run, body))


def _prepared(serving: Serving, body: ChatRequest) -> Generation:
    prompt = tuple(chat_prompt(serving, body))
    roles = partial(chat_prompt_roles, serving, body, prompt)
    return prepare(serving, body, [prompt], prefix="chatcmpl-", at="/messages", roles=roles)


async def _whole(serving: Serving, run: Generation, body: ChatRequest) -> Response:
    found, default = await answers(serving, run)

    def choice(answer: Answer) -> Choice:
        return _choice(serving, answer, body)

    extra = await added_fields(serving, run, body.prompt_lens, found, default, choice)
    completion = SteeredChatCompletion(
        id=run.id,
        object="chat.completion",
        created=run.created,
        model=run.model,
        choices=[choice(answer) for answer in found],
        usage=usage(run, sum(answer.tokens for answer in found)),
        **extra,
    )
    return JSONResponse(
        completion.model_dump(mode="json", exclude_unset=True),
        headers=headers(completion.detections or ()),
    )


def _choice(serving: Serving, answer: Answer, body: ChatRequest) -> Choice:
    logprobs = None
    if body.logprobs:
        logprobs = token_logprobs(serving.engine.tokenizer, answer.logprobs)
    return Choice(
        index=answer.index,
        finish_reason=answer.finish,
        message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
        logprobs=logprobs,
    )


def _forms(serving: Serving, run: Generation, body: ChatRequest) -> ChunkForms:
    head = {
        "id": run.id,
        "object": "chat.completion.chunk",
        "created": run.created,
        "model": run.model,
    }

    def chunk(index: int, delta: Chunk, finish: str | None = None) -> Chunk:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return {**head, "choices": [choice]}

    def text(index: int, content: str, logprobs: Logprobs) -> Chunk:
        made = chunk(index, {"content": content})
        if body.logprobs:
            found = token_logprobs(serving.engine.tokenizer, logprobs).model_dump(mode="json")
            made["choices"][0]["logprobs"] = found
        return made

    return ChunkForms(
        opening=lambda index: chunk(index, {"role": "assistant", "content": ""}),
        text=text,
        last=lambda index, finish: chunk(index, {}, finish),
        empty=lambda: {**head, "choices": []},
    )
