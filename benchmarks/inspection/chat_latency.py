"""What ordinary chats feel: the time between two tokens of short answers, streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx

_ASKED = (
    "What is the capital of France?",
    "Tell me something about the sea.",
    "How do I boil an egg?",
    "Why is the sky blue?",
)


@dataclass(frozen=True)
class Latency:
    """Seconds: of each answer's first token, between two tokens, and of whole answers divided by
    their tokens."""

    first: tuple[float, ...]
    gaps: tuple[float, ...]
    per_token: tuple[float, ...]

    def __add__(self, other: Latency) -> Latency:
        return Latency(
            self.first + other.first, self.gaps + other.gaps, self.per_token + other.per_token
        )


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def chats(http: httpx.AsyncClient, model: str, tokens: int, seconds: float) -> Latency:
    """Four people who ask again and again for `seconds`; whoever has begun is answered whole."""
    until = time.perf_counter() + seconds
    found = await asyncio.gather(*(_asking(http, model, n, tokens, until) for n in range(4)))
    return sum(found, Latency((), (), ()))


async def _asking(
    http: httpx.AsyncClient, model: str, number: int, tokens: int, until: float
) -> Latency:
    found = Latency((), (), ())
    while time.perf_counter() < until or not found.first:
        found += await _answer(http, model, _ASKED[number % len(_ASKED)], tokens)
    return found


async def _answer(http: httpx.AsyncClient, model: str, asked: str, tokens: int) -> Latency:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": asked}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    times: list[float] = []
    made = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if not answer.is_success:
            raise RuntimeError(f"HTTP {answer.status_code}: {(await answer.aread())[:1000]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            made = (chunk.get("usage") or {}).get("completion_tokens", made)
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    if made != tokens:
        raise RuntimeError(f"an answer has {made} tokens, not {tokens}")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # A chunk may hold several tokens, or none: whole answers are counted by their tokens.
    return Latency((times[0] - started,), tuple(gaps), ((times[-1] - started) / made,))
