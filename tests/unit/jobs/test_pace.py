"""Pacing: the share it keeps, when it ends, and that results do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_model

from steer.engines.base import (
    Captured,
    CaptureRequest,
    EngineStats,
    GenerationRequest,
    SamplingParams,
)
from steer.engines.fake.engine import ByteTokenizer, FakeEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import Pair, PairSet, fit
from steer.fit.requests.pairs import PairsRequest
from steer.jobs import JobContext, JobLimits
from steer.jobs.engine import BackgroundEngine
from steer.jobs.kinds.fit import fit_kind
from steer.jobs.pace import Pace
from steer.jobs.signals import JobCancelled
from steer.model import HookPoint
from steer.registry.registry import Registry


class Time:
    """Time that passes only when somebody pauses or works."""

    def __init__(self) -> None:
        self.now = self.own = 0.0
        self.load = 0
        self.loads: list[int] = []
        self.stopped = False

    def pause(self, seconds: float) -> None:
        self.now += seconds
        if self.loads:
            self.load = self.loads.pop(0)

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.own += seconds

    def check(self) -> None:
        if self.stopped:
            raise JobCancelled

    def pace(self, duty: float, quiet: float = 1.0) -> Pace:
        return Pace(
            lambda: self.load,
            self.check,
            self.pause,
            duty=duty,
            quiet_seconds=quiet,
            clock=lambda: self.now,
            thread_clock=lambda: self.own,
        )


@pytest.mark.parametrize("duty", [0.05, 0.2, 0.5, 1.0])
def test_the_share_is_kept_under_load(duty: float) -> None:
    time = Time()
    time.load = 3
    pace = time.pace(duty)
    for engine_seconds, own in ((0.01, 0.0), (0.002, 0.004), (0.03, 0.001)) * 10:
        time.now += engine_seconds
        time.work(own)
        pace.rest(engine_seconds)
    worked = 10 * (0.042 + 0.005)
    assert worked / time.now == pytest.approx(duty)
    assert pace.rested_seconds == pytest.approx(time.now - worked)


def test_nobody_rests_without_load() -> None:
    time = Time()
    pace = time.pace(0.01)
    assert not pace.busy
    pace.rest(100.0)
    assert time.now == 0


def test_a_rest_ends_when_the_load_has_been_gone_for_a_while() -> None:
    time = Time()
    time.load, time.loads = 1, [1, 1, 0, 1, 0]
    pace = time.pace(0.01, quiet=0.28)
    pace.rest(10.0)  # 990 s are due
    # The last load is seen after the fourth slice of 0.05 s; six slices later it is quiet.
    assert time.now == pytest.approx(0.2 + 0.3)
    assert not pace.busy


def test_a_rest_ends_when_the_job_must_stop() -> None:
    time = Time()
    time.load = 1
    pace = time.pace(0.01)
    pause = time.pause

    def stop_then(seconds: float) -> None:
        pause(seconds)
        time.stopped = True

    pace._pause = stop_then
    with pytest.raises(JobCancelled):
        pace.rest(10.0)
    assert time.now <= 0.05 + 1e-9


class Recording(FakeEngine):
    """Remembers how large the pieces are."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[list[int]] = []
        self.completed: list[int] = []

    def capture(self, request: CaptureRequest) -> list[Captured]:
        self.captured.append([len(prompt) for prompt in request.prompts])
        return super().capture(request)

    def complete(self, requests: Any) -> Any:
        self.completed.append(len(requests))
        return super().complete(requests)


PROMPTS = [list(range(65, 65 + length)) for length in (3, 9, 4, 30, 5, 2, 2, 8)]
POINTS = (HookPoint(1), HookPoint(4))


@pytest.mark.parametrize(
    ("load", "expected"),
    [(0, [[3, 9, 4, 30, 5, 2, 2, 8]]), (1, [[3, 9], [4], [30], [5, 2, 2], [8]])],
)
def test_captures_come_in_pieces(load: int, expected: list[list[int]]) -> None:
    time, engine = Time(), Recording()
    time.load = load
    limits = JobLimits(busy_tokens=12, idle_tokens=100)
    background = BackgroundEngine(engine, time.pace(0.5), limits)
    request = CaptureRequest(PROMPTS, POINTS, positions=(-1,), logits="last")
    found = background.capture(request)
    assert engine.captured == expected
    for one, whole in zip(found, FakeEngine().capture(request), strict=True):
        assert torch.equal(one.logits, whole.logits)
        for point in POINTS:
            assert torch.equal(one.states[point], whole.states[point])


@pytest.mark.parametrize(("load", "expected"), [(0, [4, 4, 2]), (2, [1] * 10)])
def test_answers_come_in_pieces(load: int, expected: list[int]) -> None:
    time, engine = Time(), Recording()
    time.load = load
    background = BackgroundEngine(engine, time.pace(0.5), JobLimits(idle_sequences=4))
    sampling = SamplingParams(max_tokens=8, temperature=0)
    requests = [GenerationRequest(str(n), (n + 65,), sampling) for n in range(10)]
    assert background.complete(requests) == FakeEngine().complete(requests)
    assert engine.completed == expected


def test_the_engine_is_believed_about_its_interludes() -> None:
    """What a piece waits for its turn is not the job's time."""

    class Telling(Recording):
        def stats(self) -> EngineStats:
            taken = 0.25 * len(self.captured)
            return replace(super().stats(), extra={"interlude_seconds": taken})

    time = Time()
    time.load = 1
    background = BackgroundEngine(Telling(), time.pace(0.2), JobLimits(busy_tokens=1))
    background.capture(CaptureRequest([[65], [66]], POINTS))
    assert time.now == pytest.approx(2 * 0.25 * 4)


def test_work_of_the_tokenizer_counts() -> None:
    time = Time()
    time.load = 1

    class Slow(ByteTokenizer):
        def encode(self, *args: Any, **named: Any) -> list[int]:
            time.work(0.01)
            return super().encode(*args, **named)

    engine = FakeEngine()
    engine.tokenizer = Slow()
    background = BackgroundEngine(engine, time.pace(0.1), JobLimits())
    assert background.tokenizer.encode("abc") == ByteTokenizer().encode("abc")
    assert background.tokenizer.decode([97]) == "a"
    assert background.tokenizer.chat_template == ByteTokenizer().chat_template
    assert time.now == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"duty": 0.0},
        {"duty": 1.5},
        {"queue": 0},
        {"busy_tokens": 0},
        {"idle_sequences": 0},
        {"threads": 0},
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SteerError) as raised:
        JobLimits(**changes)
    assert raised.value.code == "invalid_option"


@pytest.fixture(scope="module")
def tiny() -> Iterator[TransformersEngine]:
    with TransformersEngine(byte_model(), ByteTokenizer(), name="tiny") as running:
        yield running


@pytest.mark.parametrize("method", ["diffmean", "pca"])
def test_a_vector_fitted_in_pieces_is_the_same(
    tiny: TransformersEngine, tmp_path: Path, method: Any
) -> None:
    pairs = [Pair(f"a happy day {n}", f"a sad {n * n} day") for n in range(12)]
    lines = [{"positive": one.positive, "negative": one.negative} for one in pairs]
    params = PairsRequest.model_validate(
        {"name": "v", "pairs": lines, "method": method, "choose": "separation"}
    )
    time = Time()
    time.load = 1
    reports = []
    with Registry.open(tmp_path) as registry:
        context = JobContext(
            BackgroundEngine(tiny, time.pace(0.5), JobLimits(busy_tokens=40)),
            registry,
            tmp_path,
            tmp_path,
            lambda done, total=None, note="": reports.append((done, total)),
        )
        before = tiny.stats().extra["interlude_seconds"]
        result = fit_kind(PairsRequest).run(context, params)
        taken = tiny.stats().extra["interlude_seconds"] - before
        found = registry.vector(result["vector"])
    whole = fit(tiny, PairSet.of(pairs), name="v", method=method)
    assert found.card.provenance["data_sha256"] == whole.card.provenance["data_sha256"]
    assert found.card.used_layers == whole.card.used_layers
    for layer in whole.card.layers:
        torch.testing.assert_close(found[layer], whole[layer], rtol=1e-4, atol=1e-5)
    assert reports[0] == (0, 24)
    assert reports[-1] == (24, 24)
    # At half of the time, it rested as long as the engine had worked for it.
    assert 0 < taken == pytest.approx(time.now)
