"""Read-outs on vLLM equal an offline capture of the same tokens: among ordinary requests, with
prompts in pieces, too little memory (so that requests are preempted), and a prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest
from readout_crowd import (
    Asked,
    assert_all_compared,
    assert_all_read,
    compared,
    crowd,
    forgotten,
    reading_engine,
)
from vllm_simulation import core, forget_cache, in_engine, steering

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.front.sequences import RunningSequence
from steer.errors import EngineError, Unsupported
from steer.readouts.twins import KeptStates


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    with reading_engine(
        tmp_path_factory.mktemp("registry"),
        num_gpu_blocks_override=22,
        max_num_batched_tokens=48,
        max_num_seqs=12,
        enable_prefix_caching=True,
    ) as running:
        yield running


@pytest.fixture
def preempted(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that are put back, as they are."""
    scheduler = core(engine).scheduler
    preempt, found = scheduler._preempt_request, list[str]()

    def watched(request: object, *args: object, **named: object) -> object:
        found.append(getattr(request, "request_id", ""))
        return preempt(request, *args, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", watched)
    return found


def test_a_crowd_is_read_as_a_capture_reads_it(engine: VllmEngine, preempted: list[str]) -> None:
    asked = crowd(engine, 60)
    answers = engine.complete([one.request for one in asked])
    assert len(preempted) >= 3
    assert_all_read(engine, asked, answers)
    assert forgotten(engine)


def test_reading_changes_no_token_and_no_receipt(engine: VllmEngine) -> None:
    asked = [one.request for one in crowd(engine, 24)]
    plain = [replace(one, readouts=None) for one in asked]
    forget_cache(engine)
    read = engine.complete(asked)
    forget_cache(engine)
    said = engine.complete(plain)
    assert [one.tokens for one in read] == [one.tokens for one in said]


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_what_lies_in_the_prefix_cache_is_computed_where_it_is_read(
    engine: VllmEngine, tokens: str
) -> None:
    forget_cache(engine)
    [first] = crowd(engine, 1, tokens=tokens, length=100)
    plain = replace(first.request, readouts=None)
    engine.complete([plain])
    answers = engine.complete([first.request])
    assert_all_read(engine, [first], answers)


def test_a_stream_gives_each_token_once(engine: VllmEngine) -> None:
    [asked] = crowd(engine, 1, tokens="all", length=20)

    async def events() -> list[Sequence[int]]:
        found = []
        async for event in engine.generate(asked.request):
            found.append([one.position for one in event.readouts])
        return found

    each = asyncio.run(events())
    assert forgotten(engine)
    length = len(asked.request.prompt)
    assert each[0] == list(range(length))
    assert each[1:] == [[length + n] for n in range(len(each) - 1)]


def test_who_leaves_a_stream_leaves_nothing(engine: VllmEngine) -> None:
    [asked] = crowd(engine, 1, tokens="all", length=20)

    async def leave() -> None:
        async with aclosing(engine.generate(asked.request)) as events:  # type: ignore[type-var]
            async for _ in events:
                return

    asyncio.run(leave())
    in_engine(engine, lambda: None)
    assert forgotten(engine)


def test_divergences_are_those_of_two_offline_passes(
    engine: VllmEngine, preempted: list[str]
) -> None:
    forget_cache(engine)
    asked = compared(engine, crowd(engine, 36))
    plain = [one.request for one in crowd(engine, 12)]
    answers = engine.complete([*asked, *plain])[: len(asked)]
    assert preempted
    assert_all_compared(engine, asked, answers)
    assert forgotten(engine)


def test_divergences_come_with_the_last_token_of_a_stream(engine: VllmEngine) -> None:
    [asked] = [
        one for one in compared(engine, crowd(engine, 2)) if one.readouts and one.readouts.readers
    ]

    async def events() -> list[list[bool]]:
        found = []
        async for event in engine.generate(asked):
            found.append([one.kl is not None for one in event.readouts])
        return found

    *before, last = asyncio.run(events())
    assert not any(any(one) for one in before)
    assert sum(last) == asked.sampling.max_tokens
    assert forgotten(engine)


def test_who_leaves_while_the_twin_runs_leaves_nothing(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is aborted with the request that it follows, and takes nobody along."""
    [asked] = compared(engine, crowd(engine, 2))
    stepper = engine._driver._stepper  # type: ignore[attr-defined]
    follow = stepper._follow
    left: list[str] = []

    def leaving(sequence: RunningSequence, receipt: object) -> None:
        follow(sequence, receipt)
        left.append(sequence.key)
        stepper.abort(sequence)
        sequence.fail(EngineError("gone", code="gone"))

    monkeypatch.setattr(stepper, "_follow", leaving)
    with pytest.raises(EngineError, match="gone"):
        engine.complete([asked])
    assert left
    assert forgotten(engine)


def test_a_twin_that_fails_withholds_the_answer_and_that_alone(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    [asked] = compared(engine, crowd(engine, 2))
    take = KeptStates.take
    monkeypatch.setattr(KeptStates, "take", lambda self, fed: take(self, fed + 1))
    with pytest.raises(EngineError, match="no state was kept") as caught:
        engine.complete([asked])
    assert caught.value.code == "readouts_missed"
    monkeypatch.undo()
    assert engine.complete([asked])[0].readouts
    assert forgotten(engine)


def test_several_engines_offer_no_twins(engine: VllmEngine) -> None:
    """A twin may run on another engine than the request that it is compared with."""
    answers = engine._driver.rpc("steer_info")
    two = VllmEngine(engine._driver, engine.tokenizer, answers * 2, engine.tickets, engine.ends)
    assert set(engine.capabilities.readouts) - set(two.capabilities.readouts) == {"kl"}
    [asked] = compared(engine, crowd(engine, 2))
    with pytest.raises(Unsupported, match="'kl'"):
        two.admit(asked)


def test_read_outs_that_fail_end_their_request_alone(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lens whose head fails: whoever reads by it gets an error, its neighbours their answers."""
    asked = crowd(engine, 8)

    def broken(_: object) -> object:
        raise RuntimeError("no head")

    monkeypatch.setattr(steering(engine)._instruments, "unembed", broken)
    lenses = [one for one in asked if one.spec and "lens" in one.spec]
    with pytest.raises(EngineError, match="no head"):
        engine.complete([lenses[0].request])
    rest: list[Asked] = [one for one in asked if one not in lenses]
    monkeypatch.undo()
    assert_all_read(engine, rest, engine.complete([one.request for one in rest]))
    assert forgotten(engine)


def test_the_last_token_is_read_by_nobody(engine: VllmEngine) -> None:
    [asked] = crowd(engine, 1, tokens="generated")
    one = GenerationRequest(
        "one",
        asked.request.prompt,
        SamplingParams(max_tokens=1, temperature=0),
        readouts=asked.request.readouts,
    )
    assert engine.complete([one])[0].readouts == ()
