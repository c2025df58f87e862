"""Detectors on vLLM say what they say of the same request alone on the reference: in the form for
CUDA graphs (its kernel under Triton's interpreter), with too little memory, and with drafts."""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import demo_specs
import pytest
import vllm_engine
from artefacts import random_detector
from vllm_simulation import core, steering
from vllm_speculation import NGRAM

from steer.artefacts.arming import ArmedDetector, ReadTokens
from steer.artefacts.detection import Detection
from steer.engines.base import Completion, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.plan.cache import PlanCache
from steer.readouts.watching import ArmedPlan, WatchPlan
from steer.spec import parse_spec

STATIC = {"additional_config": {"steer": {"form": "static"}}}
TIGHT = {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
ENGINES = {
    "with too little memory": {**STATIC, **TIGHT},
    "with too little memory and drafts": {**STATIC, **TIGHT, "speculative_config": NGRAM},
}
DETECTORS = {
    "each": random_detector(70, 2, width=demo_specs.WIDTH, bias=0.5),
    "mean": random_detector(
        71, 4, width=demo_specs.WIDTH, detection=Detection(pooling="mean", last=4)
    ),
}
STEERED = (
    None,
    demo_specs.one(demo_specs.add("v0")),
    demo_specs.one(demo_specs.add("v1", layers=[3]), when={"detector": "d1", "scope": "token"}),
)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, registry: Path) -> Iterator[VllmEngine]:
    options = ENGINES[request.param]
    with vllm_engine.start_engine(registry, max_num_seqs=12, **options) as running:
        assert steering(running).edits.static
        yield running


@pytest.fixture
def preempted(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    scheduler = core(engine).scheduler
    preempt, found = scheduler._preempt_request, list[object]()

    def watched(*args: object, **named: object) -> object:
        found.append(args)
        return preempt(*args, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", watched)
    return found


def armed(tokens: ReadTokens, thresholds: tuple[float, ...] = (1e9, 1e9)) -> WatchPlan:
    return WatchPlan(
        armed=tuple(
            ArmedPlan(ArmedDetector(name=name, tokens=tokens, threshold=threshold), detector)
            for (name, detector), threshold in zip(DETECTORS.items(), thresholds, strict=True)
        )
    )


def crowd(reference: TransformersEngine, count: int) -> list[tuple[GenerationRequest, ReadTokens]]:
    draw = random.Random(12)
    cache = PlanCache(demo_specs.LIBRARY, reference.info, reference.capabilities)
    plans = [None if spec is None else cache.plan(parse_spec(spec)) for spec in STEERED]
    found: list[tuple[GenerationRequest, ReadTokens]] = []
    for n in range(count):
        prompt = tuple(draw.randrange(3, 800) for _ in range(draw.randint(20, 80)))
        sampling = SamplingParams(max_tokens=draw.randint(6, 24), temperature=0, ignore_eos=True)
        tokens: ReadTokens = ("all", "generated", "prompt")[n % 3]
        watch = armed(tokens)
        plan = plans[n // 3 % len(plans)]
        request = GenerationRequest(str(n), prompt, sampling, plan, readouts=watch.readouts)
        found.append((request, tokens))
    return found


def thresholds(done: Completion) -> tuple[float, ...]:
    """For each detector the middle of the widest gap between pooled scores, which no rounding
    carries a score across."""
    found = []
    for column, detector in enumerate(DETECTORS.values()):
        window = detector.window()
        pooled = sorted(window.push(one.numbers[column]) for one in done.readouts)
        gap, place = max((b - a, n) for n, (a, b) in enumerate(itertools.pairwise(pooled)))
        found.append(pooled[place] + gap / 2)
    return tuple(found)


def test_a_pooled_gate_fires_where_the_armed_detector_does(
    engine: VllmEngine, reference: TransformersEngine, preempted: list[object]
) -> None:
    """In one request, whose gate reads the tokens that the detector watches."""
    draw = random.Random(14)
    cache = PlanCache(demo_specs.LIBRARY, reference.info, reference.capabilities)
    detector, threshold = demo_specs.DETECTORS["d3"], 0.3
    asked: list[GenerationRequest] = []
    for n in range(18):
        tokens: ReadTokens = ("all", "generated")[n % 2]
        spec = demo_specs.one(
            demo_specs.add("v1", layers=[3]),
            when={"detector": "d3", "scope": "onward", "threshold": threshold},
            where={"positions": [[1, None]]} if tokens == "all" else {"phases": ["generation"]},
        )
        watching = WatchPlan(
            armed=(
                ArmedPlan(ArmedDetector(name="d3", tokens=tokens, threshold=threshold), detector),
            )
        )
        prompt = tuple(draw.randrange(3, 800) for _ in range(draw.randint(20, 80)))
        sampling = SamplingParams(max_tokens=draw.randint(6, 24), temperature=0, ignore_eos=True)
        plan = cache.plan(parse_spec(spec))
        asked.append(GenerationRequest(str(n), prompt, sampling, plan, readouts=watching.readouts))
    fired = []
    for n, done in enumerate(engine.complete(asked)):
        tokens = ("all", "generated")[n % 2]
        armed = ArmedPlan(ArmedDetector(name="d3", tokens=tokens, threshold=threshold), detector)
        watch = WatchPlan(armed=(armed,)).watch(len(asked[n].prompt))
        assert watch is not None
        watch.see((row.position, row.numbers) for row in done.readouts)
        assert done.receipt is not None
        (gate,) = done.receipt.gates
        assert gate.position == watch.detections[0].fired_at
        fired.append(gate.position)
    assert None in fired
    assert len(set(fired)) > 6
    assert preempted


def test_detectors_say_what_they_say_alone_on_the_reference(
    engine: VllmEngine,
    reference: TransformersEngine,
    preempted: list[object],
) -> None:
    asked = crowd(reference, 18)
    plain = [replace(one, id=f"{one.id} plain", readouts=None) for one, _ in asked[:6]]
    together = engine.complete([*(one for one, _ in asked), *plain])[: len(asked)]
    fired = []
    for (one, tokens), mine in zip(asked, together, strict=True):
        [alone] = reference.complete([one])
        assert mine.tokens == alone.tokens
        plan = armed(tokens, thresholds(alone))
        said = []
        for done in (mine, alone):
            watch = plan.watch(len(one.prompt))
            assert watch is not None
            watch.see((row.position, row.numbers) for row in done.readouts)
            said.append(watch.detections)
        for here, there in zip(*said, strict=True):
            assert here.fired_at == there.fired_at
            assert here.score == pytest.approx(there.score, abs=1e-3)
            fired.append(here.fired_at is not None)
    assert sum(fired) > len(fired) // 2
    assert preempted
