"""POST /v1/completions: text continued as it stands, without a chat template."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs as LogprobsBody
from starlette.responses import JSONResponse

from steer.engines.base import FinishReason
from steer.prompts import openai_token, part_tokens, text_tokens
from steer_server.generation.added_fields import added_fields
from steer_server.generation.generation import (
    Answer,
    Generation,
    Logprobs,
    Prompt,
    answers,
    prepare,
)
from steer_server.generation.request_models import CompletionRequest
from steer_server.generation.streaming import Chunk, ChunkForms, events, usage
from steer_server.http.content_type import require_json
from steer_server.http.disconnect import EventStream, while_connected
from steer_server.state import Serving, ServingDep

router = APIRouter(tags=["generation"], dependencies=[Depends(require_json)])


class SteeredCompletion(Completion):
    """OpenAI's completion, with the receipt in `steering`, and in `default` the choices of the
    unsteered model where the request has `"compare": true`."""

    steering: dict[str, Any] | None = None
    default: list[CompletionChoice] | None = None
    inspect: dict[str, Any] | None = None


@router.post("/v1/completions", responses={200: {"model": SteeredCompletion}})
async def create_completion(
    body: CompletionRequest, request: Request, serving: ServingDep
) -> Response:
    """Continues each prompt `n` times, steered as the request or its profile says."""
    run = await to_thread.run_sync(_prepared, serving, body)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(events(serving, run, _forms(serving, run), include_usage=include_usage))
    return await while_connected(request, lambda: _whole(serving, run, body))


def _prepared(serving: Serving, body: CompletionRequest) -> Generation:
    tokenizer = serving.engine.tokenizer
    encode = text_tokens if body.add_special_tokens else part_tokens
    prompts: list[Prompt] = [
        tuple(encode(tokenizer, prompt) if isinstance(prompt, str) else prompt)
        for prompt in body.prompt
    ]
    return prepare(serving, body, prompts, prefix="cmpl", at="/prompt")


async def _whole(serving: Serving, run: Generation, body: CompletionRequest) -> Response:
    found, default = await answers(serving, run)

    def choice(answer: Answer) -> CompletionChoice:
        return _choice(serving, answer, body)

    extra = await added_fields(serving, run, body.inspect, found, default, choice)
    completion = SteeredCompletion(
        id=run.id,
        object="text_completion",
        created=run.created,
        model=run.model,
        choices=[choice(answer) for answer in found],
        usage=usage(run, sum(answer.tokens for answer in found)),
        **extra,
    )
    return JSONResponse(completion.model_dump(mode="json", exclude_unset=True))


def _choice(serving: Serving, answer: Answer, body: CompletionRequest) -> CompletionChoice:
    logprobs = None
    if body.logprobs is not None:
        logprobs = _logprobs(serving, tuple(answer.logprobs), 0)
    return CompletionChoice(
        index=answer.index, finish_reason=answer.finish, text=answer.text, logprobs=logprobs
    )


def _logprobs(serving: Serving, logprobs: Logprobs, offset: int) -> LogprobsBody:
    """The older form: parallel lists. `offset` is where in the text the first token begins."""
    tokenizer = serving.engine.tokenizer
    tokens = [openai_token(tokenizer, token)[0] for token, _ in logprobs]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        # A part of a character takes no room of its own.
        offset += 0 if text.startswith("bytes:") else len(text)
    return LogprobsBody(
        tokens=tokens,
        token_logprobs=[found.logprob for _, found in logprobs],
        top_logprobs=[
            {openai_token(tokenizer, other)[0]: value for other, value in found.top}
            for _, found in logprobs
        ],
        text_offset=offsets,
    )


def _forms(serving: Serving, run: Generation) -> ChunkForms:
    head = {
        "id": run.id,
        "object": "text_completion",
        "created": run.created,
        "model": run.model,
    }
    sent = [0] * len(run.sequences)

    def chunk(index: int, text: str, finish: FinishReason | None = None) -> Chunk:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
        return {**head, "choices": [choice]}

    def text(index: int, content: str, logprobs: Logprobs) -> Chunk:
        made = chunk(index, content)
        if logprobs:
            found = _logprobs(serving, logprobs, sent[index]).model_dump(mode="json")
            made["choices"][0]["logprobs"] = found
        sent[index] += len(content)
        return made

    return ChunkForms(
        opening=None,
        text=text,
        last=lambda index, finish: chunk(index, "", finish),
        empty=lambda: {**head, "choices": []},
    )
