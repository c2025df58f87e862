"""Two of vLLM's streams as one: the steered answer, and the unsteered one beside it.

A chunk of the unsteered answer has its choices in `default` and none in `choices`, as Steer's own
server writes it; a client that does not know the field reads an empty chunk.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

Events = AsyncGenerator[str, None]

_DATA = "data: "
_DONE = "data: [DONE]"
_ERROR = 'data: {"error"'


async def with_default(steered: Events, unsteered: Events) -> Events:
    """The events of both as they come, `[DONE]` behind the last. An error in one ends both; so
    does closing this.

    The first event is a steered one, whose response all chunks belong to.
    """
    queue: asyncio.Queue[tuple[bool, str | BaseException | None]] = asyncio.Queue()

    async def follow(events: Events, *, default: bool) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    queue.put_nowait((default, event))
            queue.put_nowait((default, None))
        except Exception as error:
            queue.put_nowait((default, error))

    tasks = [asyncio.create_task(follow(steered, default=False))]
    head: dict[str, Any] = {}
    try:
        running = 1
        while running:
            default, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                running -= 1
                continue
            if event.startswith(_DONE):
                continue
            if len(tasks) == 1:
                head = _head(event)
                tasks.append(asyncio.create_task(follow(unsteered, default=True)))
                running += 1
            moved = _moved(event, head) if default else event
            if moved is not None:
                yield moved
            if event.startswith(_ERROR):
                break
        yield f"{_DONE}\n\n"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await unsteered.aclose()  # where it was never begun


def _head(event: str) -> dict[str, Any]:
    """What all chunks of a response have in common."""
    content = _content(event)
    return {name: content[name] for name in ("id", "created", "model") if name in content}


def _moved(event: str, head: dict[str, Any]) -> str | None:
    """A chunk of the unsteered answer, as one of the response that `head` belongs to; None for one
    without choices, which counts its tokens."""
    content = _content(event)
    if "choices" not in content:
        return event
    if not content["choices"]:
        return None
    content.pop("usage", None)
    moved = {**content, **head, "choices": [], "default": content["choices"]}
    return f"{_DATA}{json.dumps(moved, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _content(event: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(event.removeprefix(_DATA))
    return content
