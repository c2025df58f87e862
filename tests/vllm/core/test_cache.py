"""The prefix cache beside steering: what it serves, and that what it serves is exact.

Every scenario runs on an empty cache first with, then without, what went before: the tokens,
log-probabilities and receipts must be the same, and the cached tokens exactly those that may be
shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_specs
import inner_specs
import pytest
import torch
import vllm_engine
from vllm_engine import Plans
from vllm_simulation import (
    assert_all_free,
    core,
    forget_cache,
    in_engine,
    steering,
    watched,
)

from steer.engines.base import CaptureRequest, Completion, GenerationRequest, SamplingParams
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import EngineError, StorageError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan

Tokens = tuple[int, ...]

BLOCK = 32
PROMPT: Tokens = tuple(range(300, 400))
WHOLE = len(PROMPT) // BLOCK * BLOCK
ANSWER = 30
"""Enough for the answer to fill a block that begins in the prompt."""

ONWARD = {"vector": "v1", "above": 0.0, "layer": 1, "scope": "onward"}
POOLED = {"detector": "wide", "threshold": -1e9}
SPECS = {
    "plain": None,
    "all": demo_specs.SPECS["everything"],
    "prompt": demo_specs.SPECS["prompt only"],
    "generation": demo_specs.SPECS["generation only"],
    "clamp": demo_specs.SPECS["a clamp"],
    "norms": demo_specs.SPECS["norm preserved"],
    "prompt gate": demo_specs.SPECS["a prompt gate"],
    "token gate": demo_specs.SPECS["a token gate"],
    "onward": demo_specs.SPECS["an onward gate"],
    "onward from 70": demo_specs.one(
        demo_specs.add("v3", layers=[3]), where={"positions": [[70, None]]}, when=ONWARD
    ),
    "onward generated": demo_specs.one(
        demo_specs.add("v2", layers=[3]), where={"phases": ["generation"]}, when=ONWARD
    ),
    "pooled prompt": demo_specs.one(demo_specs.add("v2"), when=POOLED),
    "pooled tokens": demo_specs.SPECS["a gate on a mean of each token"],
    "pooled from 70": demo_specs.one(
        demo_specs.add("v3", layers=[3]),
        where={"positions": [[70, None]]},
        when={**POOLED, "scope": "token"},
    ),
    "pooled generated": demo_specs.SPECS["a gate from a mean on what is generated"],
    "stronger": demo_specs.one(demo_specs.add("v0", strength=0.5)),
    "from 70": demo_specs.one(demo_specs.add("v3"), where={"positions": [[70, None]]}),
    "at 350": demo_specs.one(demo_specs.add("v0", strength=-1), where={"tokens": [350]}),
    "last two": demo_specs.one(demo_specs.add("v3"), where={"positions": [[-2, None]]}),
    # Keys and values of the layer itself are made of what it reads there.
    "first keys from 70": demo_specs.one(
        {"kind": "add", "vector": "attn_in-0", "layers": [0]}, where={"positions": [[70, None]]}
    ),
    "channels": inner_specs.SPECS["channels at mlp_in"],
    "generation inside": inner_specs.SPECS["on what is generated at head_out"],
}


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    options = {"enable_prefix_caching": True, **vllm_engine.ALL_SITES}
    with vllm_engine.start_engine(registry, **options) as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: VllmEngine) -> Plans:
    cache = PlanCache(inner_specs.LIBRARY, engine.info, engine.capabilities)
    return {
        name: None if spec is None else cache.plan(demo_specs.parse_spec(spec))
        for name, spec in SPECS.items()
    }


@pytest.fixture(autouse=True)
def _idle(engine: VllmEngine) -> Iterator[None]:
    forget_cache(engine)
    yield
    assert_all_free(engine)


@dataclass(frozen=True)
class Answer:
    prompt: Tokens
    done: Completion
    cached: int

    @property
    def turn(self) -> Tokens:
        """What the next turn of the conversation begins with, and a question."""
        return (*self.prompt, *self.done.tokens, 5, 6, 7)


def ask(
    engine: VllmEngine, plan: SteeringPlan | None, prompt: Tokens = PROMPT, tokens: int = ANSWER
) -> Answer:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, logprobs=5, ignore_eos=True)
    with watched(engine) as watch:
        done = engine.complete([GenerationRequest("asked", prompt, sampling, plan)])[0]
    return Answer(prompt, done, watch.hits["asked"])


def assert_exact(engine: VllmEngine, plan: SteeringPlan | None, found: Answer) -> None:
    """Asks again with an empty cache; only `tokens_cached` may differ."""
    forget_cache(engine)
    fresh = ask(engine, plan, found.prompt, len(found.done.tokens))
    assert fresh.cached == 0
    assert found.done.tokens == fresh.done.tokens
    for mine, other in zip(found.done.logprobs, fresh.done.logprobs, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert dict(mine.top) == pytest.approx(dict(other.top), abs=1e-5)
    if plan is None:
        return
    mine_receipt, other_receipt = found.done.receipt, fresh.done.receipt
    assert mine_receipt is not None
    assert other_receipt is not None
    assert other_receipt.tokens_cached == 0
    if any(one.gate is not None and one.gate.scope == "token" for one in plan.rules):
        return  # whether a gate opened for a cached token is not known
    expected = {**other_receipt.as_json(), "tokens_cached": mine_receipt.tokens_cached}
    assert vllm_engine.plain(mine_receipt.as_json()) == vllm_engine.plain(expected)
    length = len(found.prompt)
    ids = torch.tensor(found.prompt[: found.cached]).numpy()
    steered = 0
    for n in range(found.cached):
        chosen = [
            one.selection.mask(torch.tensor([n]).numpy(), length, ids[n : n + 1])[0]
            for one in plan.rules
        ]
        steered += any(chosen)
    assert mine_receipt.tokens_cached == steered


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        ("plain", "all", 0),
        ("all", "plain", 0),
        ("plain", "generation", WHOLE),
        ("generation", "plain", WHOLE),
        ("all", "all", WHOLE),
        ("plain", "plain", WHOLE),
        ("generation", "generation", WHOLE),
        ("all", "generation", 0),
        ("generation", "all", 0),
        ("all", "prompt", 0),
        ("prompt", "all", 0),
        ("prompt", "prompt", WHOLE),
        ("all", "stronger", 0),
        ("stronger", "all", 0),
        ("plain", "from 70", 64),
        ("from 70", "plain", 64),
        ("from 70", "from 70", WHOLE),
        ("plain", "at 350", 32),
        ("at 350", "plain", 32),
        ("at 350", "at 350", WHOLE),
        ("plain", "last two", WHOLE),
        ("last two", "plain", WHOLE),
        ("plain", "prompt gate", WHOLE),
        ("prompt gate", "plain", WHOLE),
        ("plain", "token gate", 0),
        ("token gate", "token gate", WHOLE),
        # Whether an onward gate had opened lies in no name: nobody takes such blocks.
        ("plain", "onward", 0),
        ("onward", "plain", 0),
        ("onward", "onward", 0),
        ("plain", "onward from 70", 64),
        ("onward from 70", "plain", 64),
        ("onward from 70", "onward from 70", 64),
        ("onward generated", "plain", WHOLE),
        ("onward generated", "onward generated", WHOLE),
        # Of the last 10 tokens of the prompt the scores lie in no block.
        ("plain", "pooled prompt", 64),
        ("pooled prompt", "plain", 64),
        ("pooled prompt", "pooled prompt", 64),
        ("pooled tokens", "pooled tokens", 0),
        ("pooled from 70", "pooled from 70", 64),
        ("pooled generated", "pooled generated", WHOLE),
        ("clamp", "clamp", WHOLE),
        ("clamp", "norms", 0),
        ("norms", "norms", WHOLE),
        ("plain", "first keys from 70", 64),
        ("first keys from 70", "plain", 64),
        ("first keys from 70", "first keys from 70", WHOLE),
        ("plain", "channels", 0),
        ("channels", "channels", WHOLE),
        ("plain", "generation inside", WHOLE),
        ("generation inside", "plain", WHOLE),
    ],
)
def test_a_second_request_with_the_same_prompt(
    engine: VllmEngine, plans: Plans, first: str, second: str, cached: int
) -> None:
    assert ask(engine, plans[first], tokens=6).cached == 0
    found = ask(engine, plans[second], tokens=6)
    assert found.cached == cached
    assert_exact(engine, plans[second], found)


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        # Of the 130 tokens known after the first turn, 129 were computed: blocks up to 128.
        ("plain", "plain", 128),
        ("all", "all", 128),
        ("clamp", "clamp", 128),
        ("generation", "plain", WHOLE),
        ("plain", "generation", 128),
        # The answer was generated, and steered as such; now it is prompt.
        ("generation", "generation", WHOLE),
        ("prompt", "prompt", WHOLE),
        ("all", "plain", 0),
        ("plain", "all", 0),
        ("all", "prompt", 0),
        ("from 70", "from 70", 128),
        ("from 70", "plain", 64),
        ("last two", "plain", WHOLE),
        ("plain", "last two", 128),
        ("prompt gate", "plain", WHOLE),
        ("prompt gate", "prompt gate", WHOLE),
        ("token gate", "token gate", 128),
        ("onward", "onward", 0),
        ("onward from 70", "onward from 70", 64),
        ("pooled prompt", "pooled prompt", 64),
        ("pooled generated", "pooled generated", WHOLE),
        ("first keys from 70", "plain", 64),
        ("generation inside", "plain", WHOLE),
        ("channels", "channels", 128),
    ],
)
def test_the_next_turn(
    engine: VllmEngine, plans: Plans, first: str, second: str, cached: int
) -> None:
    before = ask(engine, plans[first])
    found = ask(engine, plans[second], before.turn)
    assert found.cached == cached
    assert_exact(engine, plans[second], found)


@pytest.mark.parametrize("name", ["plain", "all", "prompt", "generation", "clamp", "prompt gate"])
def test_a_conversation_of_four_turns(engine: VllmEngine, plans: Plans, name: str) -> None:
    prompt, turns = PROMPT[:20], []
    for _ in range(4):
        turns.append(ask(engine, plans[name], prompt))
        prompt = turns[-1].turn
    if name in ("plain", "all", "clamp"):
        known = [len(turn.prompt) + ANSWER - 1 for turn in turns[:-1]]
        assert [turn.cached for turn in turns] == [0, *(n // BLOCK * BLOCK for n in known)]
    for turn in turns:
        assert_exact(engine, plans[name], turn)


def test_a_generated_block_is_not_found_by_a_prompt_with_the_same_tokens(
    engine: VllmEngine, plans: Plans
) -> None:
    """X steered, Y generated and plain; then X + Y as a prompt, all of it steered."""
    plan, prompt = plans["prompt"], PROMPT[:64]
    first = ask(engine, plan, prompt, tokens=65)
    both = (*prompt, *first.done.tokens[:64])
    second = ask(engine, plan, (*both, 5))
    assert second.cached == 64
    third = ask(engine, plan, (*both, 5))
    assert third.cached == 128
    assert second.done.tokens == third.done.tokens
    # The first one's own blocks are still there, for the request that generated them.
    assert ask(engine, plan, prompt, tokens=65).cached == 32
    assert_exact(engine, plan, second)


@pytest.mark.parametrize(
    "name",
    [
        *("all", "prompt", "generation", "clamp", "prompt gate", "at 350"),
        *("pooled prompt", "pooled tokens", "pooled generated"),
    ],
)
def test_a_preempted_request_goes_on_as_if_nothing_had_been(
    engine: VllmEngine, plans: Plans, name: str
) -> None:
    """Twice: once its blocks are in the prefix cache when it comes back, once they are gone."""
    plan, scheduler = plans[name], core(engine).scheduler
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0, logprobs=5, ignore_eos=True)
    steps = []
    schedule = scheduler.schedule

    def preempting(*args: object, **named: object) -> object:
        steps.append(1)
        if len(steps) == 24:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if len(steps) == 12:
            request = scheduler.running.pop()
            scheduler._preempt_request(request, 0.0)
        return schedule(*args, **named)

    with watched(engine) as watch:
        scheduler.schedule = preempting
        try:
            request = GenerationRequest("asked", PROMPT, sampling, plan)
            done = engine.complete([request])[0]
        finally:
            del scheduler.schedule
    assert len(watch.preempted) == 2
    assert watch.resumed_from_cache == 1
    assert_exact(engine, plan, Answer(PROMPT, done, 0))


@pytest.mark.parametrize("name", ["plain", "all", "clamp", "from 70"])
def test_a_cached_prompt_is_computed_again_to_be_captured(
    engine: VllmEngine, plans: Plans, name: str
) -> None:
    points = tuple(HookPoint(layer, site) for layer in (0, 2, 5) for site in engine.info.sites)
    request = CaptureRequest([PROMPT], points, plans=[plans[name]], logits="all")
    fresh = engine.capture(request)[0]
    assert ask(engine, plans[name]).cached == WHOLE
    again = engine.capture(request)[0]
    for point in points:
        torch.testing.assert_close(again.states[point], fresh.states[point], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.logits, fresh.logits, rtol=1e-5, atol=1e-5)
    # What a captured request computes is shared with others as usual.
    assert ask(engine, plans[name]).cached == WHOLE


@pytest.mark.parametrize("name", ["all", "prompt", "token gate"])
def test_what_a_failed_request_left_in_the_cache_is_not_taken_for_steered(
    engine: VllmEngine, plans: Plans, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A plan cannot be read for a moment; its request ran unsteered, under the plan's name."""
    seats = steering(engine).requests

    def unreadable(sha256: str) -> SteeringPlan:
        raise StorageError("the disk is away")

    with monkeypatch.context() as broken:
        broken.setattr(seats, "_load", unreadable)
        with pytest.raises(EngineError, match="the disk is away"):
            ask(engine, plans[name])
    found = ask(engine, plans[name])
    assert found.cached == 0
    assert ask(engine, plans[name]).cached == WHOLE
    assert_exact(engine, plans[name], found)


def test_requests_side_by_side_share_what_they_may(engine: VllmEngine, plans: Plans) -> None:
    """Started together, each finds the blocks of those before it in the same step's queue."""
    names = ["plain", "all", "generation", "all", "plain", "prompt", "last two"] * 2
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=5, ignore_eos=True)
    requests = [
        GenerationRequest(f"{n}", PROMPT, sampling, plans[name]) for n, name in enumerate(names)
    ]
    with watched(engine) as watch:
        together = engine.complete(requests)
    hits = [watch.hits[request.id] for request in requests]
    assert set(hits) <= {0, WHOLE}
    assert sum(hits) >= 4 * WHOLE
    for name, done, hit in zip(names, together, hits, strict=True):
        assert_exact(engine, plans[name], Answer(PROMPT, done, hit))


def test_the_cache_is_emptied_between_steps_only(engine: VllmEngine, plans: Plans) -> None:
    """`forget_cache` is what the comparisons above rest on."""
    ask(engine, plans["all"])
    assert in_engine(engine, lambda: core(engine).scheduler.kv_cache_manager.usage) == 0
    assert ask(engine, plans["all"]).cached == WHOLE
    forget_cache(engine)
    assert ask(engine, plans["all"]).cached == 0
