"""POST /v1/completions: text continued as it stands, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs as LogprobsBody
from starlette.responses import JSONResponse

from steer.engines.base import FinishReason, TokenLogprob
from steer.prompts import check_text_length, openai_token, part_tokens, text_tokens
from steer_server.generation.added_fields import added_fields
from steer_server.generation.echo import Echo, Echoes, echoes
from steer_server.generation.generation import (
    Answer,
    Generation,
    Prompt,
    answers,
    check_choices,
    prepare,
)
from steer_server.generation.inspection.detectors import headers
from steer_server.generation.request_models import CompletionRequest
from steer_server.generation.streaming import Chunk, ChunkForms, events, usage
from steer_server.http.content_type import require_json
from steer_server.http.disconnect import EventStream, while_connected
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(
    tags=["generation"], dependencies=[Depends(require_json)], route_class=SteerRoute
)


class PromptAndTokens(LogprobsBody):
    """OpenAI's older log-probabilities. Nothing predicts the first token of an echoed prompt:
    there they are null, which OpenAI's own types do not know."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class Choice(CompletionChoice):
    """OpenAI's, with the log-probabilities of an echoed prompt."""

    logprobs: PromptAndTokens | None = None


class SteeredCompletion(Completion):
    """OpenAI's completion, with the receipt in `steering`, and in `default` the choices of the
    unsteered model where the request has `"compare": true`."""

    choices: list[Choice]  # type: ignore[assignment]
    steering: dict[str, Any] | None = None
    default: list[Choice] | None = None
    inspect: dict[str, Any] | None = None
    detections: list[dict[str, Any]] | None = None


@router.post("/v1/completions", responses={200: {"model": SteeredCompletion}})
async def create_completion(
    body: CompletionRequest, request: Request, serving: ServingDep
) -> Response:
    """Continues each prompt `n` times, steered as the request or its profile says."""
    run = await to_thread.run_sync(_prepared, serving, body)
    if body.stream:
        echo = await echoes(serving, run, body)
        forms = _forms(serving, run, echo if body.echo else None)
        return EventStream(events(serving, run, forms, usage_on=body.streamed_usage))
    return await while_connected(request, lambda: _whole(serving, run, body))


def _prepared(serving: Serving, body: CompletionRequest) -> Generation:
    check_choices(serving, body, len(body.prompt))
    prompts = [_tokens(serving, body, prompt) for prompt in body.prompt]
    return prepare(serving, body, prompts, prefix="cmpl-", at="/prompt")


def _tokens(serving: Serving, body: CompletionRequest, prompt: str | Prompt) -> Prompt:
    if not isinstance(prompt, str):
        return prompt
    engine = serving.engine
    check_text_length(engine.tokenizer, prompt, engine.info.max_length, param="/prompt")
    encode = text_tokens if body.add_special_tokens else part_tokens
    return tuple(encode(engine.tokenizer, prompt))


async def _whole(serving: Serving, run: Generation, body: CompletionRequest) -> Response:
    found, default = await answers(serving, run)
    echo = await echoes(serving, run, body)

    def choice(answer: Answer) -> Choice:
        return _choice(serving, answer, echo.of(answer.request), body)

    extra = await added_fields(serving, run, body.prompt_lens, found, default, choice)
    completion = SteeredCompletion(
        id=run.id,
        object="text_completion",
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


def _choice(serving: Serving, answer: Answer, echo: Echo, body: CompletionRequest) -> Choice:
    logprobs = None
    if body.logprobs is not None:
        logprobs = _logprobs(serving, (*echo.logprobs, *answer.logprobs), echo.offset)
    return Choice(
        index=answer.index,
        finish_reason=answer.finish,
        text=echo.text + answer.text,
        logprobs=logprobs,
    )


def _logprobs(
    serving: Serving, logprobs: Sequence[tuple[int, TokenLogprob | None]], offset: int
) -> PromptAndTokens:
    """The older form: parallel lists. `offset` is where in the text the first token begins, below
    0 where it is not part of it."""
    tokenizer = serving.engine.tokenizer
    tokens = [openai_token(tokenizer, token)[0] for token, _ in logprobs]
    offsets = []
    for text in tokens:
        offsets.append(max(offset, 0))
        # A part of a character takes no room of its own.
        offset += 0 if text.startswith("bytes:") else len(text)
    values = [None if found is None else found.logprob for _, found in logprobs]
    best = [None if found is None else _best(tokenizer, token, found) for token, found in logprobs]
    return PromptAndTokens(
        tokens=tokens, token_logprobs=values, top_logprobs=best, text_offset=offsets
    )


def _best(tokenizer: Any, token: int, found: TokenLogprob) -> dict[str, float]:
    """The alternatives by their text, and the token itself. Of tokens that are written alike the
    likeliest stands: that is what a reader takes the text for."""
    best: dict[str, float] = {}
    for other, value in (*found.top, (token, found.logprob)):
        best.setdefault(openai_token(tokenizer, other)[0], value)
    return best


def _forms(serving: Serving, run: Generation, echo: Echoes | None) -> ChunkForms:
    head = {
        "id": run.id,
        "object": "text_completion",
        "created": run.created,
        "model": run.model,
    }
    together = (*run.sequences, *run.default)
    sent = [0] * len(together)

    def chunk(index: int, text: str, finish: FinishReason | None = None) -> Chunk:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
        return {**head, "choices": [choice]}

    def text(
        index: int, content: str, logprobs: Sequence[tuple[int, TokenLogprob | None]]
    ) -> Chunk:
        made = chunk(index, content)
        if logprobs:
            found = _logprobs(serving, logprobs, sent[index]).model_dump(mode="json")
            made["choices"][0]["logprobs"] = found
        sent[index] += len(content)
        return made

    def prompt(index: int) -> Chunk:
        found = (echo or Echoes()).of(together[index])
        sent[index] = found.offset
        made = text(index, found.text, found.logprobs)
        sent[index] = len(found.text)
        return made

    return ChunkForms(
        opening=None if echo is None else prompt,
        text=text,
        last=lambda index, finish: chunk(index, "", finish),
        empty=lambda: {**head, "choices": []},
    )
