"""Engines over the same weights, side by side, give what one gives."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from artefacts import artefacts, random_spec
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, LAYERS, VOCABULARY, WIDTH

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Captured, CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.replicas.dividing import divided
from steer.engines.transformers.replicas.engine import ReplicatedEngine
from steer.errors import EngineError, SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

MADE = artefacts(WIDTH, LAYERS)
ADD = {"interventions": [{"kind": "add", "vector": "v0", "strength": 1.5}]}
POINT = HookPoint(1, "resid_post")

Pair = tuple[TransformersEngine, ReplicatedEngine]


@pytest.fixture
def pair(tiny_model: Callable[[str], torch.nn.Module]) -> Iterator[Callable[[str], Pair]]:
    """One engine and a replicated one, over the same weights."""
    made: list[TransformersEngine] = []

    def get(model: str = "llama") -> Pair:
        one = TransformersEngine(copy.deepcopy(tiny_model(model)), None, rows=4)
        many = ReplicatedEngine(copy.deepcopy(tiny_model(model)), None, replicas=3, rows=4)
        for engine in (one, many):
            made.append(engine)
            engine.start()
        return one, many

    yield get
    for engine in made:
        engine.stop()


def requests(engine: TransformersEngine, count: int, **sampling: Any) -> list[GenerationRequest]:
    draw = random.Random(count)
    plans = PlanCache(MemoryLibrary(**MADE), engine.info, engine.capabilities)
    made = []
    for number in range(count):
        spec = random_spec(draw, layers=LAYERS, longest=3) if number % 3 else None
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 30)))
        params = SamplingParams(max_tokens=draw.randint(1, 9), logprobs=0, seed=number, **sampling)
        plan = None if spec is None else plans.plan(parse_spec(spec))
        made.append(GenerationRequest("r", prompt, params, plan, measure=True))
    return made


@pytest.mark.parametrize("model", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_one_engine(
    pair: Callable[[str], Pair], model: str, temperature: float
) -> None:
    one, many = pair(model)
    asked = [requests(engine, 13, temperature=temperature) for engine in (one, many)]
    for alone, divided_up in zip(one.complete(asked[0]), many.complete(asked[1]), strict=True):
        assert alone.tokens == divided_up.tokens
        assert [x.logprob for x in alone.logprobs] == pytest.approx(
            [x.logprob for x in divided_up.logprobs], abs=1e-4
        )
        assert (alone.receipt is None) == (divided_up.receipt is None)
        if alone.receipt is not None and divided_up.receipt is not None:
            assert alone.receipt.tokens_steered == divided_up.receipt.tokens_steered
    assert many.complete([]) == []


def test_readings_are_those_of_one_engine(pair: Callable[[str], Pair]) -> None:
    def read(engine: TransformersEngine) -> list[Captured]:
        draw = random.Random(5)
        shared = tuple(draw.randrange(3, VOCABULARY) for _ in range(12))
        texts = [(*shared, *(draw.randrange(3, VOCABULARY) for _ in range(4))) for _ in range(7)]
        texts += [tuple(draw.randrange(3, VOCABULARY) for _ in range(n)) for n in (5, 9, 30)]
        plan = PlanCache(MemoryLibrary(**MADE), engine.info, engine.capabilities).plan(
            parse_spec(ADD)
        )
        plans = [plan if n % 2 else None for n in range(len(texts))]
        return [
            *engine.capture(CaptureRequest(texts, points=(POINT,), plans=plans, logits="last")),
            *engine.capture(CaptureRequest(texts, logprobs=0, tail=4)),
        ]

    one, many = pair("llama")
    for alone, divided_up in zip(read(one), read(many), strict=True):
        assert alone.states.keys() == divided_up.states.keys()
        for point, states in alone.states.items():
            torch.testing.assert_close(divided_up.states[point], states, atol=1e-5, rtol=1e-5)
        if alone.logits is not None and divided_up.logits is not None:
            torch.testing.assert_close(divided_up.logits, alone.logits, atol=1e-4, rtol=1e-4)
        assert [x.logprob for x in divided_up.logprobs] == pytest.approx(
            [x.logprob for x in alone.logprobs], abs=1e-4
        )


def test_all_take_part_and_hold_the_weights_once(pair: Callable[[str], Pair]) -> None:
    _, many = pair("llama")
    fed: list[int] = []
    for number, one in enumerate(many._replicas):
        one._hooked.model.register_forward_pre_hook(lambda *_, n=number: fed.append(n))
    many.complete(requests(many, 6, temperature=0))
    assert set(fed) == {0, 1, 2}
    fed.clear()
    many.capture(CaptureRequest([(5, 6, 7), (8, 9, 10), (11, 12, 13)], logits="last"))
    assert set(fed) == {0, 1, 2}
    first, *others = (list(one._hooked.model.parameters()) for one in many._replicas)
    for other in others:
        assert all(a is b for a, b in zip(first, other, strict=True))


def test_what_fails_in_one_reaches_who_asked(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, many = pair("llama")
    broken = many._replicas[1]._batch

    def fail(*_: object) -> list[Any]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(broken, "join", fail)
    with pytest.raises(EngineError, match="out of luck"):
        many.complete(requests(many, 6, temperature=0))
    monkeypatch.undo()
    assert len(many.complete(requests(many, 6, temperature=0))) == 6
    with pytest.raises(SteerError, match="position 99"):
        many.capture(CaptureRequest([(5, 6), (7, 8)], points=(POINT,), positions=(99,)))


def test_work_of_the_engine_itself_may_read(pair: Callable[[str], Pair]) -> None:
    """What runs in the first engine's thread waits for the others, and never for itself."""
    _, many = pair("llama")
    texts = [(5, 6, 7), (8, 9, 10), (11, 12, 13)]
    asked = CaptureRequest(texts, logits="last")
    inside = many.differentiate(lambda _: many.capture(asked))
    for one, other in zip(inside, many.capture(asked), strict=True):
        assert one.logits is not None
        torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)


def test_a_model_that_has_no_copy_runs_alone(tiny_model: Callable[[str], torch.nn.Module]) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.lock = threading.Lock()
    with ReplicatedEngine(model, None, replicas=3, rows=4) as engine:
        assert len(engine._replicas) == 1
        answers = engine.complete(requests(engine, 5, temperature=0))
        assert len(answers) == 5


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=12),
    st.integers(1, 4),
    st.none() | st.integers(1, 4),
)
def test_every_prompt_is_in_one_part(
    prompts: list[list[int]], parts: int, tail: int | None
) -> None:
    found = divided(CaptureRequest(prompts, tail=tail), parts)
    assert len(found) == parts
    assert sorted(n for part in found for n in part) == list(range(len(prompts)))
    # No part has more than its share and a prompt's tokens.
    total, longest = sum(map(len, prompts)), max(map(len, prompts), default=0)
    assert all(sum(len(prompts[n]) for n in part) <= total / parts + longest for part in found)


def test_what_is_computed_once_stays_together() -> None:
    prompts = [[1, 2, 3, tail] for tail in range(4)] + [[4, 5, 6, tail] for tail in range(4)]
    mixed = [prompts[n] for n in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert divided(CaptureRequest(mixed, tail=1), 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
