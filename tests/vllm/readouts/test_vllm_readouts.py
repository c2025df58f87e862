"""Read-outs on vLLM equal an offline capture of the same tokens: among ordinary requests, with
prompts in pieces, too little memory (so that requests are preempted), and a prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest
import vllm_engine
from readout_crowd import Asked, assert_all_read, crowd, forgotten, register
from vllm_simulation import core, forget_cache, in_engine, steering

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import EngineError, Unsupported
from steer.registry.registry import Registry


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("registry")
    with Registry.open(folder) as registry:
        register(registry)
    with vllm_engine.start_engine(
        folder,
        num_gpu_blocks_override=22,
        max_num_batched_tokens=48,
        max_num_seqs=12,
        enable_prefix_caching=True,
    ) as running:
        yield running


def test_a_crowd_is_read_as_a_capture_reads_it(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = core(engine).scheduler
    preempt, preempted = scheduler._preempt_request, list[str]()

    def watched(request: object, *args: object, **named: object) -> object:
        preempted.append(getattr(request, "request_id", ""))
        return preempt(request, *args, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", watched)
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


def test_what_cannot_be_read_is_refused_by_name(engine: VllmEngine) -> None:
    assert "kl" not in engine.capabilities.readouts
    [asked] = crowd(engine, 1)
    assert asked.request.readouts is not None
    kl = replace(asked.request.readouts, fields=("kl",))
    with pytest.raises(Unsupported, match="'kl'"):
        engine.complete([replace(asked.request, readouts=kl)])


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
