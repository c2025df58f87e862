"""How the engine's thread is handed work."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from liveness import LIVENESS_SECONDS
from tiny_models import byte_model

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.listeners import Item
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.sequences import BatchSequence


def test_what_is_completed_together_is_batched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the thread is: the bits of an answer would depend on it. Here it is so fast that
    whatever it is handed has joined before anything else is handed over."""
    requests = [
        GenerationRequest(str(n), (1 + n, 2, 3), SamplingParams(max_tokens=3, temperature=0))
        for n in range(6)
    ]
    joined: list[list[str]] = []
    has_joined = threading.Event()
    with TransformersEngine(byte_model(), ByteTokenizer(), name="tiny", rows=4) as engine:
        engine.start()  # the thread waits from here on, and would take the first one alone
        join = engine._batch.join

        def noted(newcomers: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
            joined.append([one.request.id for one in newcomers])
            has_joined.set()
            return join(newcomers)

        def handed(item: object) -> None:
            send(item)
            assert has_joined.wait(LIVENESS_SECONDS)

        monkeypatch.setattr(engine._batch, "join", noted)
        send = engine._scheduler._send
        monkeypatch.setattr(engine._scheduler, "_send", handed)
        engine.complete(requests)
    assert joined == [["0", "1", "2", "3"], ["4", "5"]]
