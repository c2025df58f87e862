"""Steer's fields on vLLM's own responses."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from steer.engines.receipts import merged
from steer.errors import EngineError
from steer_server.generation.inspection.detectors import with_detections
from steer_server.generation.inspection.readouts import with_readouts
from steer_server.generation.steering import Steering
from steer_server.http.openai_errors import failure
from steer_server.metrics import Metrics
from steer_server.vllm.pending_receipts import PendingReceipts

_DONE = "data: [DONE]"
_DATA = "data: "
_ERROR = 'data: {"error"'
_CHOICES = 'data: {"id"'
"""How a chunk begins."""

_LAST = ("event: response.completed", "event: response.incomplete")
"""How the last event of a streamed response begins; it holds the whole response."""
_EVENT_ERROR = "event: error"

Events = AsyncGenerator[str, None]
AddReceipt = Callable[[Events, PendingReceipts, Steering, Metrics], Events]


def receipt_of(pending: PendingReceipts) -> dict[str, Any]:
    """The field `steering` of the response; none where nothing was steered.

    Raises `EngineError` where vLLM answered and the receipts did not come.
    """
    if not pending.complete:
        raise EngineError(
            "vLLM ended the request without saying what was applied to it, so the answer is "
            "withheld: try again",
            code="not_steered",
        )
    receipt = merged(pending.receipts)
    return {} if receipt is None else {"steering": receipt.as_json()}


def stopped_fields(pending: PendingReceipts) -> dict[str, Any]:
    """What a response of /v1/responses says where a detector has ended it."""
    if not pending.stopped:
        return {}
    return {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}


def with_fields(response: Response, fields: dict[str, Any]) -> Response:
    """A whole JSON response with `fields` in it; its headers and background work stay."""
    content = {**json.loads(bytes(response.body)), **fields}
    response.body = response.render(content)
    response.headers["content-length"] = str(len(response.body))
    return response


async def with_receipt(
    events: Events, pending: PendingReceipts, steering: Steering, metrics: Metrics
) -> Events:
    """vLLM's events, the receipt on the last one before `[DONE]`.

    Events pass at once until the receipts are there; only then may one of them be the last.
    """
    try:
        with metrics.request(steering.profile, steering.vectors, steering.strengths):
            held = ""
            failed = False
            async with aclosing(events):
                async for event in events:
                    if pending.unsent and event.startswith(_CHOICES):
                        event = _with_readouts(event, pending)  # noqa: PLW2901
                    failed |= event.startswith(_ERROR)
                    if failed:
                        passing, held = [held, _told(event, pending)], ""
                    elif event.startswith(_DONE):
                        passing, held = [_last(held, pending), event], ""
                    elif event.startswith(_DATA) and pending.complete:
                        passing, held = [held], event
                    else:
                        passing = [event]
                    for one in filter(None, passing):
                        yield one
            if failed:
                raise _Failed
    except _Failed:
        pass


async def with_receipt_inside(
    events: Events, pending: PendingReceipts, steering: Steering, metrics: Metrics
) -> Events:
    """vLLM's events of a response, the receipt in the response that the last one holds.

    An error ends them with an event of its own: nothing of vLLM's is sent after it.
    """
    number, ended, failed = 0, False, False
    try:
        with metrics.request(steering.profile, steering.vectors, steering.strengths):
            async with aclosing(events):
                async for event in events:
                    failed |= event.startswith(_EVENT_ERROR)
                    ended |= event.startswith(_LAST)
                    yield _with_inner(event, pending) if event.startswith(_LAST) else event
                    number += 1
            if failed:
                raise _Failed
            if not ended:
                receipt_of(pending)
    except _Failed:
        pass
    except Exception as error:
        _, body = failure(pending.refused or error)
        told = {name: body["error"][name] for name in ("code", "message", "param")}
        content = {"type": "error", "sequence_number": number, **told, **body}
        yield f"{_EVENT_ERROR}\n{_DATA}{json.dumps(content)}\n\n"


def _with_inner(event: str, pending: PendingReceipts) -> str:
    head, _, data = event.partition(f"\n{_DATA}")
    content = json.loads(data)
    content["response"] |= with_detections(receipt_of(pending), pending.told())
    if pending.stopped:
        content["response"] |= stopped_fields(pending)
        content["type"] = "response.incomplete"
        head = "event: response.incomplete"
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"{head}\n{_DATA}{text}\n\n"


class _Failed(Exception):
    """vLLM has told the client of an error; the metrics are to know."""


def _told(event: str, pending: PendingReceipts) -> str:
    """vLLM's error event; with our own code where the steering is the reason."""
    if pending.refused is None or not event.startswith(_ERROR):
        return event
    return f"{_DATA}{json.dumps(failure(pending.refused)[1])}\n\n"


def _with_readouts(event: str, pending: PendingReceipts) -> str:
    """A chunk with what was read of the tokens up to it."""
    content = with_readouts(json.loads(event.removeprefix(_DATA)), pending.sent())
    return f"{_DATA}{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _last(held: str, pending: PendingReceipts) -> str:
    try:
        content = json.loads(held.removeprefix(_DATA)) if held else {"choices": []}
        receipt = receipt_of(pending).get("steering", {})
        content = with_readouts(content, pending.sent())
        if receipt:
            content["steering"] = {**receipt, **content.get("steering", {})}
        content = with_detections(content, pending.told())
    except EngineError as error:
        content = failure(error)[1]
    return f"{_DATA}{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
