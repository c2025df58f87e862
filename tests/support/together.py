"""Requests that meet: all are there before the first of them runs, however slowly they are sent."""

from __future__ import annotations

from collections.abc import Sequence

from steer.engines.base import Completion, GenerationRequest
from steer.engines.listeners import BlockingListener
from steer.engines.transformers.engine import TransformersEngine


def complete_together(
    engine: TransformersEngine, requests: Sequence[GenerationRequest]
) -> list[Completion]:
    """As `engine.complete`, but submitted from the engine's own thread, between two steps."""
    listeners = submit_together(engine, requests)
    return [listener.result() for listener in listeners]


def submit_together(
    engine: TransformersEngine, requests: Sequence[GenerationRequest]
) -> list[BlockingListener]:
    """Who waits for each of `requests`, which the engine considers for the same step."""
    scheduler, listeners = engine._scheduler, [BlockingListener() for _ in requests]
    scheduler.run(
        lambda: [scheduler.submit(*pair) for pair in zip(requests, listeners, strict=True)]
    )
    return listeners
