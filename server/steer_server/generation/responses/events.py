"""The events of a streamed response, as OpenAI names and orders them.

The receipt is in the response of the last event, `response.completed` or `response.incomplete`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel

from steer.engines.receipts import merged
from steer_server.generation.generation import Answer, Generation, Logprobs, pieces
from steer_server.generation.responses.body import (
    OutputMessage,
    OutputText,
    as_json,
    ended,
    message_id,
    message_of,
    response_of,
)
from steer_server.generation.responses.request import ResponsesRequest
from steer_server.generation.streaming import stream_failure
from steer_server.generation.token_logprobs import token_logprobs
from steer_server.state import Serving

_TEXT = {"output_index": 0, "content_index": 0}


class _Events:
    """Numbers the events."""

    def __init__(self) -> None:
        self._number = -1

    def event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number}
        for name, value in fields.items():
            data[name] = as_json(value) if isinstance(value, BaseModel) else value
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def response_events(
    serving: Serving, run: Generation, body: ResponsesRequest
) -> AsyncGenerator[str, None]:
    """The body of the streamed response, event by event. An error ends it with an error event."""
    steering, made = run.steering, _Events()
    try:
        with serving.metrics.request(steering.profile, steering.vectors, steering.strengths):
            async with aclosing(_events(serving, run, body, made)) as events:
                async for event in events:
                    yield event
    except Exception as error:
        # The status line is long gone. OpenAI's clients raise on the entry `error`.
        found = stream_failure(serving, run, error)
        yield made.event(
            "error", **{k: found["error"][k] for k in ("code", "message", "param")}, **found
        )


async def _events(
    serving: Serving, run: Generation, body: ResponsesRequest, made: _Events
) -> AsyncGenerator[str, None]:
    tokenizer = serving.engine.tokenizer
    begun = response_of(run, body, status="in_progress")
    item = OutputMessage(id=message_id(run), status="in_progress")
    place = {"item_id": item.id, **_TEXT}
    for kind in ("response.created", "response.in_progress"):
        yield made.event(kind, response=begun)
    yield made.event("response.output_item.added", output_index=0, item=item)
    yield made.event("response.content_part.added", **place, part=OutputText())
    answer = Answer(0, run.sequences[0])
    waiting: Logprobs = ()
    async with aclosing(pieces(serving, run, run.sequences)) as stream:
        async for piece in stream:
            answer.add(piece)
            waiting += piece.logprobs
            if piece.text or (waiting and piece.finish is not None):
                yield made.event(
                    "response.output_text.delta",
                    **place,
                    delta=piece.text,
                    logprobs=_logprobs(tokenizer, waiting),
                )
                waiting = ()
    message = message_of(tokenizer, run, answer)
    (part,) = message.content
    yield made.event(
        "response.output_text.done",
        **place,
        text=part.text,
        logprobs=_logprobs(tokenizer, tuple(answer.logprobs)),
    )
    yield made.event("response.content_part.done", **place, part=part)
    yield made.event("response.output_item.done", output_index=0, item=message)
    receipt = merged([answer.receipt])
    whole = response_of(
        run,
        body,
        **ended(run, answer),
        output=[message],
        steering=None if receipt is None else receipt.as_json(),
        detections=list(answer.detections) or None,
    )
    yield made.event(f"response.{whole.status}", response=whole)


def _logprobs(tokenizer: Any, logprobs: Logprobs) -> list[dict[str, Any]]:
    found = token_logprobs(tokenizer, logprobs).content or []
    return [one.model_dump(mode="json") for one in found]
