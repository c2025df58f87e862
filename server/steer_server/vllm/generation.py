"""POST /v1/chat/completions, /v1/completions and /v1/responses: vLLM's own routes, with Steer's
fields.

vLLM's functions do the work, so that tools, structured output, adapters and whatever else they
know stay theirs. A request without Steer's fields is handed on as it came.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeGuard, cast

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.responses import api_router as responses

from steer.errors import SteerError
from steer_server.generation.inspection.detectors import headers, with_detections
from steer_server.generation.inspection.inspected import inspected
from steer_server.generation.inspection.readouts import with_readouts
from steer_server.generation.request_models import not_streamed
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving
from steer_server.vllm.answers import (
    AddReceipt,
    receipt_of,
    stopped_fields,
    with_fields,
    with_receipt,
    with_receipt_inside,
)
from steer_server.vllm.compared_streams import with_default
from steer_server.vllm.pending_receipts import PendingReceipts
from steer_server.vllm.requests import (
    FindRoles,
    PlainChatRequest,
    PlainCompletionRequest,
    PlainResponsesRequest,
    refuse_text,
    roles_of_chat,
    roles_of_response,
)
from steer_server.vllm.steer_fields import SteerFields, concerns, planned, take_fields

Call = Callable[[Any, Request], Awaitable[Response | None]]
"""One of vLLM's routes; answers None where the client has gone."""


@dataclass(frozen=True)
class TheirRoute:
    """One of vLLM's routes: `stream` puts a receipt into its events, and the field `answer` of its
    whole response holds what was said."""

    call: Call
    stream: AddReceipt
    answer: str
    roles: FindRoles
    streams_added: bool = True
    """Whether its stream has room for read-outs and unsteered choices."""

    def stopped(self, pending: PendingReceipts) -> dict[str, Any]:
        """What the response says of an answer that a detector has ended, where its choices do
        not."""
        return stopped_fields(pending) if self.stream is with_receipt_inside else {}


_CHAT = TheirRoute(chat.create_chat_completion, with_receipt, "choices", roles_of_chat)
_COMPLETION = TheirRoute(completion.create_completion, with_receipt, "choices", refuse_text)
_RESPONSES = TheirRoute(
    responses.create_responses,
    with_receipt_inside,
    "output",
    roles_of_response,
    streams_added=False,
)


class SteeredRoute(SteerRoute):
    """Answers Steer's errors; vLLM's own keep their form."""

    answered: ClassVar[tuple[type[Exception], ...]] = (SteerError, ClientDisconnect)


router = APIRouter(route_class=SteeredRoute)


def _like(theirs: APIRouter, path: str) -> dict[str, Any]:
    """The arguments for a route that looks like one of vLLM's from outside."""
    route = next(one for one in theirs.routes if isinstance(one, APIRoute) and one.path == path)
    return {"path": path, "dependencies": route.dependencies, "responses": route.responses}


@router.post(**_like(chat.router, "/v1/chat/completions"), response_model=None)
async def create_chat_completion(
    request: PlainChatRequest, raw_request: Request
) -> Response | None:
    """vLLM's chat completion, with `steering`, `receipt`, `compare`, `inspect` and `detectors`."""
    return await _answered(_CHAT, request, raw_request)


@router.post(**_like(completion.router, "/v1/completions"), response_model=None)
async def create_completion(
    request: PlainCompletionRequest, raw_request: Request
) -> Response | None:
    """vLLM's completion, with `steering`, `receipt`, `compare`, `inspect` and `detectors`."""
    return await _answered(_COMPLETION, request, raw_request)


@router.post(**_like(responses.router, "/v1/responses"), response_model=None)
async def create_responses(request: PlainResponsesRequest, raw_request: Request) -> Response | None:
    """vLLM's response, with `steering`, `receipt`, `compare`, `inspect` and `detectors`."""
    return await _answered(_RESPONSES, request, raw_request)


async def _answered(route: TheirRoute, request: Any, raw_request: Request) -> Response | None:
    state, call = raw_request.app.state, route.call
    serving: Serving = state.steer
    watches_all = bool(serving.settings.detectors)
    if not concerns(request, state.openai_serving_models, watches_all=watches_all):
        return await call(request, raw_request)
    issuer = cast("Any", serving.engine).tickets
    take = partial(take_fields, serving, request, state.openai_serving_models)
    fields = await planned(serving, issuer, take, len(await raw_request.body()))
    if request.stream and not route.streams_added:
        asked = {"inspect": fields.watch.own is not None, "compare": fields.added.compare}
        for name in (name for name, given in asked.items() if given):
            raise not_streamed(name)
    request.model = fields.model
    if fields.ticket is None:
        return await call(request, raw_request)
    ticket = fields.ticket
    if ticket.reads_roles:
        roles = await route.roles(fields.steering.roles_at, request, raw_request)
        ticket = replace(ticket, roles=roles)
    plain = request.model_copy() if fields.added.compare else None
    pending = state.steer_guard.expect(
        ticket,
        inspects=fields.added.prompt_lens is not None,
        watch=fields.watch,
    )
    # vLLM generates one token then, and leaves it out.
    pending.silent = getattr(request, "max_tokens", None) == 0
    request.vllm_xargs = {**(request.vllm_xargs or {}), **pending.extra_args}
    if request.stream:
        response = await call(request, raw_request)
        if isinstance(response, StreamingResponse):
            events = cast("Any", response.body_iterator)
            if plain is not None:
                beside = await call(plain, raw_request)
                if not isinstance(beside, StreamingResponse):
                    await events.aclose()
                    return beside
                events = with_default(events, cast("Any", beside.body_iterator))
            response.body_iterator = route.stream(events, pending, fields.steering, serving.metrics)
            return response
        if _is_answer(response) and response.status_code < 400:
            return with_fields(response, receipt_of(pending))
        return response
    try:
        return await _whole(route, raw_request, serving, fields, pending, request, plain)
    except _Refused as refused:
        return refused.response


def _is_answer(response: Response | None) -> TypeGuard[Response]:
    """Whether vLLM has answered. Where the client has hung up it gives nothing, and from 0.33 on
    nothing in a response."""
    return response is not None and bool(response.body)


class _Refused(Exception):
    """vLLM has answered with an error of its own; the metrics are to know."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


async def _said(
    route: TheirRoute, request: Any, raw_request: Request, pending: PendingReceipts
) -> Response | None:
    """vLLM's response. Raises what Steer refused, which vLLM raises or answers in words of its
    own."""
    try:
        response = await route.call(request, raw_request)
    except Exception as error:
        if pending.refused is None:
            raise
        raise pending.refused from error
    if pending.refused is not None:
        raise pending.refused
    return response


async def _whole(
    route: TheirRoute,
    raw_request: Request,
    serving: Serving,
    fields: SteerFields,
    pending: PendingReceipts,
    request: Any,
    plain: Any,
) -> Response:
    """A response in one piece; `plain` is the same request without steering, to compare with."""
    steering = fields.steering
    with serving.metrics.request(steering.profile, steering.vectors, steering.strengths):
        beside = None
        if plain is not None:
            beside = asyncio.ensure_future(route.call(plain, raw_request))
        try:
            response = await _said(route, request, raw_request, pending)
            default = None if beside is None else await beside
        finally:
            if beside is not None:
                beside.cancel()
        if not _is_answer(response) or (beside is not None and not _is_answer(default)):
            raise ClientDisconnect
        for answer in (response, default):
            if answer is not None and answer.status_code >= 400:
                raise _Refused(answer)
        added = with_readouts(receipt_of(pending), pending.sent())
        added = {**with_detections(added, pending.told()), **route.stopped(pending)}
        if default is not None:
            added["default"] = json.loads(bytes(default.body))[route.answer]
        if fields.added.prompt_lens is not None:
            added["inspect"] = await inspected(
                serving,
                fields.added.prompt_lens,
                pending.prompts[0],
                steering,
                pending.ticket.roles,
            )
        response = with_fields(response, added)
        response.headers.update(headers(pending.detections))
        return response
