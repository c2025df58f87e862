"""One suite for both engines: the same model, specs and prompts on transformers and on vLLM.

A test file imports everything from here and gives the fixture `engine`, and `closed` where its
engine does not open all sites; the others are those of `tests/vllm/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import demo_specs
import pytest
import torch
import vllm_engine
from vllm_engine import Plans

from steer.engines.base import CaptureRequest, Completion, Engine, GenerationRequest
from steer.engines.listeners import BlockingListener
from steer.engines.token_rows import proven_rows
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import NotFinite, SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import KINDS, SITES, Site, parse_spec


@pytest.fixture(scope="module")
def closed() -> frozenset[Site]:
    """The sites that the engine was not told to open."""
    return frozenset()


@pytest.fixture(scope="module")
def rounds() -> int:
    """How often each spec is in a batch of mixed requests."""
    return 3


@pytest.fixture(scope="module")
def alone_each() -> int:
    """One request of so many of a batch runs alone too."""
    return 1


def assert_same(mine: Completion, other: Completion, name: str) -> None:
    assert mine.tokens == other.tokens, name
    assert mine.finish == other.finish, name
    for a, b in zip(mine.logprobs, other.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4), name
        assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-4), name
    if mine.receipt is None or other.receipt is None:
        assert mine.receipt == other.receipt, name
        return
    assert vllm_engine.plain(mine.receipt.as_json()) == vllm_engine.plain(other.receipt.as_json())
    for p, q in zip(mine.receipt.hook_points, other.receipt.hook_points, strict=True):
        assert p.relative_size == (q.relative_size and pytest.approx(q.relative_size, rel=1e-3))
    for g, h in zip(mine.receipt.gates, other.receipt.gates, strict=True):
        assert g.value == (None if h.value is None else pytest.approx(h.value, rel=1e-3, abs=1e-4))


@pytest.mark.parametrize("seed", range(3))
def test_mixed_requests_are_equal_on_both_engines(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans, rounds: int, seed: int
) -> None:
    requests = demo_specs.requests_for(plans, rounds * len(plans), seed=seed)
    mine, other = engine.complete(requests), reference.complete(requests)
    for request, a, b in zip(requests, mine, other, strict=True):
        assert_same(a, b, request.id)
    assert engine.stats().slots_in_use == 0


def test_a_request_alone_equals_itself_in_a_batch(
    engine: VllmEngine, plans: Plans, alone_each: int
) -> None:
    requests = demo_specs.requests_for(plans, len(plans), seed=9)
    together = engine.complete(requests)
    for request, batched in list(zip(requests, together, strict=True))[::alone_each]:
        alone = engine.complete([request])[0]
        assert alone.tokens == batched.tokens, request.id


def test_every_state_and_logit_is_the_same(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans, closed: frozenset[Site]
) -> None:
    points = tuple(HookPoint(layer, site) for layer in range(6) for site in engine.info.sites)
    prompts = [(5, 9, 200, 31), tuple(range(40, 75)), (7,)]
    for name in (
        "unsteered",
        "everything",
        "a clamp that competes",
        "ablate at attn_out",
        "low rank at head_out",
        "channels at mlp_act",
        "ablate at attn_in",
        "a transcoder that competes at mlp_in",
        "a pursuit at mlp_in",
    ):
        if name.endswith(tuple(f" at {site}" for site in closed)):
            continue
        request = CaptureRequest(prompts, points, plans=[plans[name]] * 3, logits="all")
        for mine, other in zip(engine.capture(request), reference.capture(request), strict=True):
            for point in points:
                torch.testing.assert_close(
                    mine.states[point], other.states[point], rtol=1e-4, atol=1e-4
                )
            torch.testing.assert_close(mine.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_tokens_have_the_same_rows(engine: VllmEngine, reference: TransformersEngine) -> None:
    tokens = [0, 1500, 3071, 7]
    mine, other = (proven_rows(one, tokens) for one in (engine, reference))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_captured_positions_are_those_asked_for(engine: VllmEngine) -> None:
    prompt, point = tuple(range(40, 75)), HookPoint(3)
    whole = engine.capture(CaptureRequest([prompt], (point,)))[0].states[point]
    # The prompt is in the prefix cache now, and is computed again.
    some = engine.capture(CaptureRequest([prompt], (point,), positions=(-1, 0, 7)))[0]
    torch.testing.assert_close(some.states[point], whole[[-1, 0, 7]], rtol=1e-5, atol=1e-5)
    assert some.logits is None


def test_unsteered_tokens_keep_their_bits(engine: VllmEngine, plans: Plans) -> None:
    request = GenerationRequest("plain", tuple(range(50, 70)), plan=None)
    sampling = demo_specs.SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    plain = GenerationRequest("plain", request.prompt, sampling)
    beside = GenerationRequest("other", tuple(range(150, 170)), sampling)
    steered = GenerationRequest("other", beside.prompt, sampling, plans["everything"])
    without = engine.complete([plain, beside])[0]
    with_steering = engine.complete([plain, steered])[0]
    assert without.tokens == with_steering.tokens
    assert without.logprobs == with_steering.logprobs


RUNS_OVER = {
    "everywhere": {},
    "in the first token alone": {"where": {"positions": [[0, 1]]}},
    "in what is generated alone": {"where": {"phases": ["generation"]}},
}


@pytest.mark.parametrize("name", RUNS_OVER)
def test_a_request_whose_numbers_run_over_ends_alone(engine: VllmEngine, name: str) -> None:
    """Twice, so that the cache holds what the first left; then its blocks are others'."""
    item = demo_specs.add("v0", strength={"norm": 1e14}, layers="all")
    spec = parse_spec({"interventions": [item] * 6, **RUNS_OVER[name]})
    over = PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities).plan(spec)
    greedy = demo_specs.SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    drawn = demo_specs.SamplingParams(max_tokens=8, seed=1, logprobs=1, ignore_eos=True)
    neighbours = [
        GenerationRequest("greedy", tuple(range(50, 90)), greedy),
        GenerationRequest("drawn", tuple(range(90, 130)), drawn),
    ]
    _outcomes(engine, neighbours)
    prompt = tuple(range(150, 190))
    harmless = [GenerationRequest("harmless", tuple(range(240, 280)), greedy), *neighbours]
    wanted = [_outcomes(engine, harmless)[1:] for _ in range(2)]
    for sampling, others in zip((greedy, drawn), wanted, strict=True):
        refused, *found = _outcomes(
            engine, [GenerationRequest("over", prompt, sampling, over), *neighbours]
        )
        assert isinstance(refused, NotFinite)
        assert found == others
    assert _outcomes(engine, harmless)[1:] == wanted[1]
    if engine.capabilities.captures and name != "in what is generated alone":
        with pytest.raises(NotFinite):
            engine.capture(CaptureRequest([prompt], (HookPoint(5),), plans=[over]))


def _outcomes(
    engine: VllmEngine, requests: Sequence[GenerationRequest]
) -> list[Completion | SteerError]:
    """What becomes of requests that begin in the same step."""
    listeners = [BlockingListener() for _ in requests]
    engine._driver.submit(list(map(engine._sequence, requests, listeners)))
    outcomes: list[Completion | SteerError] = []
    for listener in listeners:
        try:
            outcomes.append(listener.result())
        except SteerError as error:
            outcomes.append(error)
    return outcomes


def test_engines_say_what_they_can_do(engine: Engine, closed: frozenset[Site]) -> None:
    assert engine.capabilities.engine == "vllm"
    assert set(engine.capabilities.kinds) == set(KINDS)
    assert engine.info.n_layers == demo_specs.LAYERS
    assert set(engine.info.sites) == set(SITES) - closed
