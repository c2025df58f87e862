"""Chunks of a streamed answer, as OpenAI sends them.

Every choice gets chunks of text and one with its `finish_reason`. With `"compare": true` the
unsteered choices come in chunks of the same form between them, in `default`, while `choices` is
empty. The receipt is on the last chunk before `[DONE]`: the one with the usage where that is asked
for, otherwise the last finish chunk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from openai.types import CompletionUsage

from steer.engines.base import FinishReason, Receipt
from steer.engines.receipts import merged
from steer.readouts.answer import Entry
from steer_server.generation.generation import Generation, Logprobs, Piece, pieces
from steer_server.generation.inspection.detectors import with_detections
from steer_server.generation.inspection.readouts import with_readouts
from steer_server.generation.request_models import UsageOn
from steer_server.http.openai_errors import failure
from steer_server.http.request_id import request_id
from steer_server.state import Serving

log = logging.getLogger("steer.server")

Chunk = dict[str, Any]


@dataclass(frozen=True)
class ChunkForms:
    """How chat, or plain completions, write a chunk.

    `opening` makes the chunk that begins choice `index`, where there is one; `text` a chunk of
    text with the log-probabilities of its tokens; `last` the one with the finish reason; `empty`
    a chunk without choices. Unsteered choices are counted behind the steered.
    """

    opening: Callable[[int], Chunk] | None
    text: Callable[[int, str, Logprobs], Chunk]
    last: Callable[[int, FinishReason], Chunk]
    empty: Callable[[], Chunk]


@dataclass
class _Progress:
    """Log-probabilities whose text is still held back, per choice, and read-outs that wait for the
    next chunk."""

    waiting: dict[int, Logprobs]
    unsent: list[Entry]
    tokens: int = 0
    unfinished: int = 0

    def sent(self) -> list[Entry]:
        """The read-outs that go with the next chunk."""
        entries, self.unsent = self.unsent, []
        return entries


async def events(
    serving: Serving, run: Generation, forms: ChunkForms, *, usage_on: UsageOn
) -> AsyncGenerator[str, None]:
    """The body of the response, event by event. An error ends it with an error event."""
    steering = run.steering
    try:
        with serving.metrics.request(steering.profile, steering.vectors, steering.strengths):
            async with aclosing(_chunks(serving, run, forms, usage_on)) as chunks:
                async for chunk in chunks:
                    yield _event(chunk)
    except Exception as error:
        # The status line is long gone: OpenAI's clients raise on an event with an error in it.
        yield _event(stream_failure(serving, run, error))
    yield "data: [DONE]\n\n"


def stream_failure(serving: Serving, run: Generation, error: Exception) -> dict[str, Any]:
    """The body of the error that ends a stream, counted; logged where it is no request's fault."""
    status, body = failure(error)
    if status >= 500:
        log.error("request %s (%s) failed while streaming", run.id, request_id(), exc_info=error)
    serving.metrics.rejects.labels(code=body["error"]["code"]).inc()
    return body


async def _chunks(
    serving: Serving, run: Generation, forms: ChunkForms, usage_on: UsageOn
) -> AsyncGenerator[Chunk, None]:
    together = (*run.sequences, *run.default)
    steered = len(run.sequences)
    progress = _Progress({}, [], unfinished=len(together))

    def counted(chunk: Chunk) -> Chunk:
        chunk = beside(chunk, steered)
        if usage_on == "none":
            return chunk
        so_far = _usage_body(run, progress) if usage_on == "every" else None
        return {**chunk, "usage": so_far}

    if forms.opening is not None:
        for index in range(len(together)):
            yield counted(forms.opening(index))
    receipts: list[Receipt | None] = []
    detections: list[Entry] = []
    async with aclosing(pieces(serving, run, together)) as stream:
        async for piece in stream:
            progress.tokens += piece.tokens if piece.index < steered else 0
            progress.unsent.extend(piece.readouts)
            for chunk in _of_piece(piece, forms, progress):
                yield counted(with_readouts(chunk, progress.sent()))
            if piece.finish is None:
                continue
            if piece.index < steered:
                receipts.append(piece.receipt)
                detections.extend(piece.detections)
            last = forms.last(piece.index, piece.finish)
            if not progress.unfinished and usage_on == "none":
                last |= with_detections(_steering(receipts), detections)
            yield counted(with_readouts(last, progress.sent()))
    if usage_on != "none":
        last = with_detections(_steering(receipts), detections)
        yield {**forms.empty(), "usage": _usage_body(run, progress), **last}


def beside(chunk: Chunk, steered: int) -> Chunk:
    """`chunk` of one of the `steered` choices as it is; that of an unsteered one, which is counted
    behind them, under `default`, where clients that do not know the field read nothing."""
    default = [one for one in chunk["choices"] if one["index"] >= steered]
    if not default:
        return chunk
    moved = [{**one, "index": one["index"] - steered} for one in default]
    return {**chunk, "choices": [], "default": moved}


def _of_piece(piece: Piece, forms: ChunkForms, progress: _Progress) -> list[Chunk]:
    progress.unfinished -= piece.finish is not None
    logprobs = progress.waiting.pop(piece.index, ()) + piece.logprobs
    if piece.text or (logprobs and piece.finish is not None):
        return [forms.text(piece.index, piece.text, logprobs)]
    if logprobs:
        progress.waiting[piece.index] = logprobs
    return []


def usage(run: Generation, completion_tokens: int) -> CompletionUsage:
    """Token counts; a prompt counts once for all of its choices."""
    prompt_tokens = sum(len(prompt) for prompt in run.prompts)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _usage_body(run: Generation, progress: _Progress) -> Chunk:
    return usage(run, progress.tokens).model_dump(exclude_none=True)


def _steering(receipts: list[Receipt | None]) -> Chunk:
    receipt = merged(receipts)
    return {} if receipt is None else {"steering": receipt.as_json()}


def _event(data: Chunk) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
