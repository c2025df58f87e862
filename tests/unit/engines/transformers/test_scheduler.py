"""How the engine's thread is handed work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from liveness import LIVENESS_SECONDS
from tiny_models import byte_model

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.listeners import Item
from steer.engines.transformers import scheduler
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


MOST_JOBS = 10_000
REQUEST = GenerationRequest("one", (1, 2, 3), SamplingParams(max_tokens=24, temperature=0))


def test_jobs_that_come_without_end_leave_requests_their_turn() -> None:
    """As two clients post them who sweep: one has always asked when the other is answered."""
    done = threading.Event()
    jobs: list[int] = []
    with TransformersEngine(byte_model(), ByteTokenizer(), name="tiny") as engine:

        def again() -> None:
            jobs.append(1)
            if not done.is_set() and len(jobs) < MOST_JOBS:
                engine._scheduler._inbox.put(again)

        engine.start()
        engine._scheduler._inbox.put(again)
        engine.complete([REQUEST])
        done.set()
    assert 0 < len(jobs) < MOST_JOBS


def test_while_requests_run_jobs_have_no_more_time_than_they(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    did: list[str] = []
    with TransformersEngine(byte_model(), ByteTokenizer(), name="tiny") as engine:
        clock = SimpleNamespace(perf_counter=lambda: now)
        monkeypatch.setattr(scheduler, "time", clock)
        decode = engine._batch.decode

        def step() -> list[tuple[BatchSequence, Item]]:
            nonlocal now
            now += 1.0
            did.append("step")
            if len(did) == 1:
                for _ in range(2):
                    engine._scheduler._inbox.put(job)
            return decode()

        def job() -> None:
            nonlocal now
            now += 5.0
            did.append("job")

        monkeypatch.setattr(engine._batch, "decode", step)
        engine.complete([REQUEST])
    first, second = (n for n, what in enumerate(did) if what == "job")
    assert did[first + 1 : second] == ["step"] * 5


def test_a_job_that_waits_for_its_turn_is_done_before_the_end() -> None:
    answered: list[int] = []
    engine = TransformersEngine(byte_model(), ByteTokenizer(), name="tiny")
    with engine:
        for n in range(3):
            engine._scheduler._inbox.put(lambda n=n: answered.append(n))
        engine.start()
    assert answered == [0, 1, 2]
