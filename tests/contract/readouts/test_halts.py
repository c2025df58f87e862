"""Requests that detectors end: with the token that fires, alone and in a crowd, in every form of
the running batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from artefacts import random_detector
from readout_oracle import reading, reading_library
from readout_oracle import steering as plan_of
from tiny_models import LAYERS, VOCABULARY, WIDTH
from together import complete_together

from steer.artefacts.arming import ArmedDetector
from steer.artefacts.detection import Detection
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Completion, GenerationRequest, SamplingParams
from steer.engines.fake.engine import FakeEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError, Unsupported
from steer.readouts.watching import Watch, WatchPlan, compile_armed

FORMS: dict[str, dict[str, Any]] = {
    "padded": {"chunk": 7, "rows": 6},
    "packed": {"batching": "packed", "rows": 6, "cache_tokens": 64},
    "alone": {"batching": "alone", "rows": 6},
}
READ = reading_library(WIDTH, LAYERS)
LIBRARY = MemoryLibrary(
    detectors={
        "odd": random_detector(3, 1, width=WIDTH),
        "slow": random_detector(3, 2, width=WIDTH, detection=Detection(pooling="mean", last=3)),
    }
)
ADDED = {"interventions": [{"kind": "add", "vector": "v0", "layers": [0, 1]}]}


@pytest.fixture(params=FORMS)
def engine(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], torch.nn.Module]
) -> Iterator[TransformersEngine]:
    with TransformersEngine(tiny_model("llama"), None, **FORMS[request.param]) as made:
        yield made


def watched(
    engine: TransformersEngine, request: GenerationRequest, *, spec: dict[str, Any] | None
) -> tuple[GenerationRequest, Watch]:
    """`request` with detectors beside the read-outs that it has of its own."""
    armed = (ArmedDetector.model_validate({"action": "stop", **(spec or {})}),)
    found = compile_armed(armed, LIBRARY, engine.info, engine.capabilities)
    plan = WatchPlan(request.readouts, found)
    watch = plan.watch(len(request.prompt))
    assert watch is not None

    def halt(found: Any) -> bool:
        return watch.see([(one.position, one.numbers) for one in found])

    return replace(request, readouts=plan.readouts, halt=halt), watch


def pooled(
    engine: TransformersEngine, request: GenerationRequest, done: Completion, name: str, tokens: str
) -> dict[int, float]:
    """By position, the pooled scores of a whole answer, from a capture of its tokens; the first of
    all is not watched."""
    detector = LIBRARY.detectors[name]
    whole = [*request.prompt, *done.tokens]
    capture = CaptureRequest([whole], (detector.point,), plans=[request.plan])
    (captured,) = engine.capture(capture)
    first = len(request.prompt) if tokens == "generated" else 1
    end = len(request.prompt) if tokens == "prompt" else len(whole) - 1
    scores = detector.scores(captured.states[detector.point])[first:end].tolist()
    return dict(enumerate(map(detector.window().push, scores), start=first))


def crowd(engine: TransformersEngine) -> list[GenerationRequest]:
    draw = random.Random(7)
    plan = plan_of(engine, READ, ADDED)
    found = []
    for n in range(12):
        steered = plan if n % 2 else None
        own = reading(engine, READ, {"norms": [1], "tokens": "generated"}, steered)
        found.append(
            GenerationRequest(
                str(n),
                tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 30))),
                SamplingParams(max_tokens=10, temperature=0, ignore_eos=True),
                steered,
                readouts=own if n % 3 == 0 else None,
            )
        )
    return found


def test_a_crowd_ends_where_each_detector_fires(engine: TransformersEngine) -> None:
    plain = crowd(engine)
    whole = engine.complete([replace(one, readouts=None) for one in plain])
    asked, expected = [], []
    for n, (request, done) in enumerate(zip(plain, whole, strict=True)):
        name, tokens = ("odd", "slow")[n % 2], ("generated", "all", "prompt")[n // 2 % 3]
        scores = pooled(engine, request, done, name, tokens)
        ranked = sorted(scores.values())
        # Between two scores that are far apart, so that the last bits of neither decide.
        gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(ranked)]
        threshold = max(gaps)[1] if gaps else ranked[0] - 1.0
        fires = next(at for at, score in scores.items() if score > threshold)
        spec = {"name": name, "tokens": tokens, "threshold": threshold}
        asked.append(watched(engine, request, spec=spec))
        expected.append(fires)
    answers = complete_together(engine, [request for request, _ in asked])
    for (request, watch), done, plain_done, fires in zip(
        asked, answers, whole, expected, strict=True
    ):
        length = len(request.prompt)
        shown = max(fires + 1 - length, 0)
        assert done.finish == "content_filter"
        assert done.tokens == plain_done.tokens[:shown]
        assert (watch.stopped_at, watch.detections[0].fired_at) == (fires, fires)
        if request.plan is not None:
            assert done.receipt is not None
            fed = done.receipt.tokens_steered + done.receipt.tokens_skipped
            assert fed == length + shown
    assert engine.stats().slots_in_use == 0


def test_what_only_tags_changes_nothing(engine: TransformersEngine) -> None:
    plain = crowd(engine)
    whole = engine.complete(plain)
    asked = [
        watched(engine, one, spec={"name": "odd", "action": "tag", "tokens": "all"})
        for one in plain
    ]
    for done, again, (request, watch) in zip(
        whole, complete_together(engine, [one for one, _ in asked]), asked, strict=True
    ):
        assert (again.tokens, again.finish, again.receipt) == (
            done.tokens,
            done.finish,
            done.receipt,
        )
        scores = pooled(engine, request, done, "odd", "all")
        assert watch.detections[0].score == pytest.approx(max(scores.values()), abs=1e-4)


def test_a_watch_that_fails_ends_its_request_alone(engine: TransformersEngine) -> None:
    first, second = crowd(engine)[:2]
    asked, _ = watched(engine, first, spec={"name": "odd"})

    def broken(_: Any) -> bool:
        raise EngineError("no number")

    with pytest.raises(EngineError, match="no number"):
        engine.complete([replace(asked, halt=broken)])
    assert len(engine.complete([second])[0].tokens) == 10


def test_a_halt_without_anything_read_is_refused() -> None:
    request = GenerationRequest("a", (1, 2), halt=lambda _: True)
    with pytest.raises((EngineError, Unsupported)):
        FakeEngine().admit(request)
