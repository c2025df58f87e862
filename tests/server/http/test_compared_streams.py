"""Two of vLLM's streams as one, without vLLM: whose chunk is whose, and what ends them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from steer_server.vllm.compared_streams import with_default

DONE = "data: [DONE]\n\n"


def chunk(id_: str, text: str | None = None, **fields: Any) -> str:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    content = {"id": id_, "created": 1, "model": "m", "choices": choices, **fields}
    return f"data: {json.dumps(content)}\n\n"


class Stream:
    """Events in turn, and then, where it `hangs`, none until it is closed; knows whether it was
    closed or read to its end."""

    def __init__(self, *events: str, hangs: bool = False) -> None:
        self._events, self._hangs = events, hangs
        self.begun = self.closed = False

    async def read(self) -> AsyncGenerator[str, None]:
        self.begun = True
        try:
            for event in self._events:
                yield event
            if self._hangs:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def merged(steered: Stream, unsteered: Stream) -> list[Any]:
    found = []
    async for event in with_default(steered.read(), unsteered.read()):
        data = event.removeprefix("data: ").strip()
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


async def test_both_are_chunks_of_one_response() -> None:
    steered = Stream(chunk("a", "1"), chunk("a", "2"), chunk("a", usage={"total": 2}), DONE)
    unsteered = Stream(chunk("b", "x"), chunk("b", "y"), chunk("b", usage={"total": 9}), DONE)
    *chunks, last = await merged(steered, unsteered)
    assert last == "[DONE]"
    assert {one["id"] for one in chunks} == {"a"}
    own = [c["delta"]["content"] for one in chunks for c in one["choices"]]
    beside = [c["delta"]["content"] for one in chunks for c in one.get("default", [])]
    assert (own, beside) == (["1", "2"], ["x", "y"])
    assert [one["usage"] for one in chunks if "usage" in one] == [{"total": 2}]
    assert "default" not in chunks[0]
    assert steered.closed
    assert unsteered.closed


async def test_an_error_in_either_ends_both() -> None:
    error = 'data: {"error": {"message": "no"}}\n\n'
    for streams in [
        (Stream(chunk("a", "1"), error, DONE), Stream(chunk("b", "x"), hangs=True)),
        (Stream(chunk("a", "1"), hangs=True), Stream(chunk("b", "x"), error, DONE)),
    ]:
        *_, told, last = await merged(*streams)
        assert told == {"error": {"message": "no"}}
        assert last == "[DONE]"
        assert all(one.closed for one in streams if one.begun)


async def test_whoever_leaves_closes_both() -> None:
    steered, unsteered = (Stream(*[chunk("a", "1")] * 3, hangs=True) for _ in range(2))
    async with aclosing(with_default(steered.read(), unsteered.read())) as events:
        found = 0
        async for _ in events:
            found += 1
            if found == 4:
                break
    assert (steered.closed, unsteered.closed) == (True, True)


async def test_where_the_first_fails_the_other_never_begins() -> None:
    steered, unsteered = Stream('data: {"error": {}}\n\n'), Stream(chunk("b", "x"))
    assert (await merged(steered, unsteered))[-1] == "[DONE]"
    assert steered.closed
    assert not unsteered.begun or unsteered.closed


async def test_a_stream_without_events_is_an_empty_one() -> None:
    unsteered = Stream(chunk("b", "x"))
    assert await merged(Stream(), unsteered) == ["[DONE]"]
    assert not unsteered.begun
