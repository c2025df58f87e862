"""POST /v1/responses: the route that OpenAI's clients use by default today."""

from __future__ import annotations

from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import JSONResponse

from steer.prompts import chat_tokens, check_text_length
from steer.prompts.roles import chat_roles
from steer_server.generation.added_fields import added_fields
from steer_server.generation.generation import Answer, Generation, answers, prepare
from steer_server.generation.inspection.detectors import headers
from steer_server.generation.responses.body import (
    OutputMessage,
    SteeredResponse,
    as_json,
    ended,
    message_of,
    response_of,
)
from steer_server.generation.responses.events import response_events
from steer_server.generation.responses.request import ResponsesRequest
from steer_server.http.content_type import require_json
from steer_server.http.disconnect import EventStream, while_connected
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(
    tags=["generation"], dependencies=[Depends(require_json)], route_class=SteerRoute
)


@router.post("/v1/responses", responses={200: {"model": SteeredResponse}})
async def create_response(
    body: ResponsesRequest, request: Request, serving: ServingDep
) -> Response:
    """Answers a conversation, steered as the request or its profile says. Nothing is stored."""
    run = await to_thread.run_sync(_prepared, serving, body)
    if body.stream:
        return EventStream(response_events(serving, run, body))
    return await while_connected(request, lambda: _whole(serving, run, body))


def _prepared(serving: Serving, body: ResponsesRequest) -> Generation:
    engine, turns = serving.engine, body.turns
    check_text_length(engine.tokenizer, turns, engine.info.max_length, param="/input")
    prompt = tuple(chat_tokens(engine.tokenizer, turns, param="/input"))
    roles = partial(chat_roles, engine.tokenizer, turns, param="/input")
    return prepare(serving, body, [prompt], prefix="resp_", at="/input", roles=roles)


async def _whole(serving: Serving, run: Generation, body: ResponsesRequest) -> Response:
    (answer,), default = await answers(serving, run)

    def message(one: Answer) -> OutputMessage:
        return message_of(serving.engine.tokenizer, run, one)

    extra = await added_fields(serving, run, body.prompt_lens, [answer], default, message)
    found = response_of(run, body, **ended(run, answer), output=[message(answer)], **extra)
    return JSONResponse(as_json(found), headers=headers(answer.detections))
