"""The fake keeps an engine's promises: deterministic, steered differently, cancelled cleanly."""

from __future__ import annotations

from contextlib import aclosing

import pytest
import torch

from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams, TokenEvent
from steer.engines.fake.controls import FakeFailure, Stepper
from steer.engines.fake.engine import FakeEngine
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.errors import CapacityError, EngineError, SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.registry.registry import Registry
from steer.spec import parse_spec

PROMPT = tuple(ByteTokenizer().encode("How are you?"))


@pytest.fixture
def plan(engine: FakeEngine, registry: Registry) -> SteeringPlan:
    spec = parse_spec({"interventions": [{"kind": "add", "vector": "joy"}]})
    return PlanCache(registry, engine.info, engine.capabilities).plan(spec)


def request(plan: SteeringPlan | None = None, **sampling: int) -> GenerationRequest:
    params = SamplingParams(temperature=0, **{"max_tokens": 400, **sampling})
    return GenerationRequest("r", PROMPT, params, plan)


async def collect(engine: FakeEngine, wanted: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(wanted)]


async def test_streamed_and_whole_answers_agree(engine: FakeEngine, plan: SteeringPlan) -> None:
    for wanted in (request(), request(plan), request(plan, max_tokens=3)):
        events = await collect(engine, wanted)
        (whole,) = engine.complete([wanted])
        kept = events[:-1] if whole.finish == "stop" else events
        assert tuple(event.token for event in kept) == whole.tokens
        assert events[-1].receipt == whole.receipt
        assert (events[-1].receipt is None) == (wanted.plan is None)
    plain, steered = engine.complete([request(), request(plan)])
    assert plain.tokens != steered.tokens


async def test_closing_frees_the_slot(engine: FakeEngine, plan: SteeringPlan) -> None:
    async with aclosing(engine.generate(request(plan))) as events:  # type: ignore[type-var]
        await anext(events)
        assert engine.stats().slots_in_use == 1
        assert engine.stats().requests_running == 1
    assert engine.stats().slots_in_use == engine.stats().requests_running == 0
    assert engine.counts == {"started": 1, "cancelled": 1}


async def test_a_stop_predicate_ends_with_a_receipt(engine: FakeEngine, plan: SteeringPlan) -> None:
    seen: list[int] = []

    def stop(token: int) -> bool:
        seen.append(token)
        return len(seen) == 4

    wanted = GenerationRequest("r", PROMPT, request().sampling, plan, stop=stop)
    events = await collect(engine, wanted)
    assert [event.token for event in events] == seen
    assert events[-1].finish == "stop"
    assert events[-1].receipt is not None
    assert events[-1].receipt.tokens_steered == len(PROMPT) + 3


async def test_failures_and_full_tables(registry: Registry, plan: SteeringPlan) -> None:
    engine = FakeEngine(slots=0, failure=FakeFailure(after=2))
    with pytest.raises(EngineError):
        await collect(engine, request())
    assert engine.counts["failed"] == 1
    with pytest.raises(CapacityError):
        await collect(engine, request(plan))
    with pytest.raises(SteerError, match="tokens"):
        engine.admit(GenerationRequest("r", tuple(range(600))))


async def test_tokens_wait_for_the_stepper(engine: FakeEngine) -> None:
    engine.stepper = Stepper()
    engine.stepper.allow(2)
    async with aclosing(engine.generate(request())) as events:  # type: ignore[type-var]
        await anext(events)
        await anext(events)
        waiting = engine.stepper.wait()
        engine.stepper.allow()
        await waiting


def test_captures_follow_the_prompt_and_the_edits(engine: FakeEngine, plan: SteeringPlan) -> None:
    points = (HookPoint(0), HookPoint(4), HookPoint(4, "mlp_act"))
    plain, steered = engine.capture(
        CaptureRequest([PROMPT, PROMPT], points, plans=[None, plan], logits="last")
    )
    assert plain.states[points[1]].shape == (len(PROMPT), 16)
    assert plain.states[points[2]].shape == (len(PROMPT), 32)
    assert torch.equal(plain.states[points[0]], steered.states[points[0]])
    assert not torch.equal(plain.states[points[1]], steered.states[points[1]])
    assert plain.logits is not None
    assert plain.logits.shape == (1, engine.info.vocab_size)
    (one,) = engine.capture(CaptureRequest([PROMPT[:5]], points[:1], positions=(-1,)))
    assert torch.equal(one.states[points[0]][0], plain.states[points[0]][4])


def test_the_tokenizer_round_trips() -> None:
    tokenizer = ByteTokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüße 🙂"}])
    assert isinstance(text, str)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Grüße 🙂"
