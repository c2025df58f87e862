"""What an engine that speculates owes: drafts that do not stay leave no trace.

Tokens, log-probabilities and receipts with the sizes of edits are those of the transformers engine,
which computes one token after another; what the contract asks beside them is asked here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import vllm_engine
from vllm_contract import (
    assert_same,
    test_a_request_whose_numbers_run_over_ends_alone,  # noqa: F401
    test_captured_positions_are_those_asked_for,  # noqa: F401
    test_unsteered_tokens_keep_their_bits,  # noqa: F401
)
from vllm_engine import Plans
from vllm_simulation import core, steering
from vllm_speculation import DRAFTS, NGRAM, counted_drafts

from steer.engines.base import GenerationRequest, SamplingParams, SpeculationReceipt
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import NotFinite
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

REPEATING = (7, 8, 9, 10, 11, 12) * 4
"""A prompt in which every token has been followed by the same one before."""


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(registry, speculative_config=NGRAM) as running:
        yield running


def test_mixed_requests_are_those_without_drafts(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
) -> None:
    """Prompts of which half say everything twice, so that drafts come from them."""
    requests = [
        replace(one, prompt=(one.prompt * 2)[:80]) if n % 2 else one
        for n, one in enumerate(demo_specs.requests_for(plans, 2 * len(plans), seed=2))
    ]
    with counted_drafts(engine) as drafts:
        mine = engine.complete(requests)
    for request, a, b in zip(requests, mine, reference.complete(requests), strict=True):
        assert_same(a, b, request.id)
    assert drafts.total.accepted >= 30
    assert drafts.total.drafted - drafts.total.accepted >= 20
    assert engine.stats().slots_in_use == 0


def greedy(name: str, prompt: tuple[int, ...], plan: Any, tokens: int = 24) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(name, prompt, sampling, plan, measure=True)


def test_receipts_say_what_was_drafted_and_what_of_it_was_fed(
    engine: VllmEngine, plans: Plans
) -> None:
    """As vLLM counts it, but for what stood at the answer's end: the last token is never fed, and
    those behind a limit are no part of it."""
    requests = [greedy(name, REPEATING, plan) for name, plan in plans.items() if plan is not None]
    with counted_drafts(engine) as drafts:
        done = engine.complete(requests)
    for request, one in zip(requests, done, strict=True):
        assert one.receipt is not None
        speculation = one.receipt.speculation
        assert speculation is not None
        made = drafted = fed = 0
        for count, stayed in drafts.of(request.id):
            drafted += count
            fed += max(min(stayed, len(one.tokens) - 1 - made), 0)
            made += stayed + 1
        assert speculation == SpeculationReceipt(drafted, fed), request.id
    total = drafts.total
    assert total.drafted >= 100
    assert 10 <= total.accepted <= total.drafted - 10


def test_an_unsteered_request_has_no_receipt(engine: VllmEngine) -> None:
    assert engine.complete([greedy("plain", REPEATING, None)])[0].receipt is None


def test_a_draft_that_runs_over_and_does_not_stay_harms_nobody(engine: VllmEngine) -> None:
    """An edit that ruins one token alone, which is drafted and never chosen: the answer is the
    plain one, and nothing was steered. Where the token is chosen, the answer is withheld."""
    prompt, rejected, chosen = a_prompt_with_drafts(engine)
    plain = engine.complete([greedy("plain", prompt, None)])[0]
    ruin = demo_specs.add("v0", strength={"norm": 1e14}, layers="all")
    for token in (rejected, chosen):
        where = {"tokens": [token], "phases": ["generation"]}
        spec = parse_spec({"interventions": [ruin] * 6, "where": where})
        plan = PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities).plan(spec)
        request = greedy("ruined", prompt, plan)
        if token == chosen:
            with pytest.raises(NotFinite):
                engine.complete([request])
            continue
        with drafted_tokens(engine) as drafted:
            done = engine.complete([request])[0]
        assert token in drafted
        assert done.tokens == plain.tokens
        assert done.receipt is not None
        assert done.receipt.tokens_steered == 0


def a_prompt_with_drafts(engine: VllmEngine) -> tuple[tuple[int, ...], int, int]:
    """A prompt, a token that is drafted for its answer and is none of it, and one that is fed."""
    draw = random.Random(3)
    for _ in range(40):
        start = tuple(draw.randrange(3, demo_specs.VOCABULARY) for _ in range(12))
        told = engine.complete([greedy("told", start, None)])[0].tokens
        noise = [draw.randrange(3, demo_specs.VOCABULARY) for _ in told]
        # What it says itself, each word followed by another one than it says then.
        prompt = (*(token for pair in zip(told, noise, strict=True) for token in pair), *start)
        with drafted_tokens(engine) as drafted:
            answer = engine.complete([greedy("answer", prompt, None)])[0].tokens
        rejected = sorted(drafted - {*answer})
        if rejected:
            return prompt, rejected[0], answer[2]
    raise AssertionError("nothing was drafted that did not stay")


@contextmanager
def drafted_tokens(engine: VllmEngine) -> Iterator[set[int]]:
    """The tokens that passes computed as drafts while it was open."""
    scheduler, found = core(engine).scheduler, set[int]()
    schedule = scheduler.schedule

    def schedule_watched(*args: Any, **named: Any) -> Any:
        output = schedule(*args, **named)
        found.update(*output.scheduled_spec_decode_tokens.values())
        return output

    scheduler.schedule = schedule_watched
    try:
        yield found
    finally:
        del scheduler.schedule


def test_drafts_come_and_go_within_their_bounds(engine: VllmEngine, plans: Plans) -> None:
    """The longest sequence there may be: no draft stands behind its end."""
    length = engine.info.max_length
    prompt = (REPEATING * 20)[: length - 30]
    done = engine.complete([greedy("long", prompt, plans["every layer"], tokens=30)])[0]
    assert len(done.tokens) == 30
    assert done.receipt is not None
    assert done.receipt.tokens_steered == length - 1
    assert steering(engine).requests.ledger.drafts == DRAFTS
