"""A crowd on one small vLLM engine: what came of it, what it should be, and what vLLM did.

Import this module before vllm, as `vllm_engine`.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import demo_specs
import torch
from float64_reference import Seen, chosen
from liveness import LIVENESS_SECONDS
from vllm_crowd import Client, Crowd, Habits, Outcome, calls, serve
from vllm_engine import Plans, plain

from steer.engines.base import (
    Engine,
    GenerationRequest,
    Receipt,
    SamplingParams,
    TokenLogprob,
)
from steer.engines.vllm.core.cache_keys import ticket_of
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.front.sequences import RunningSequence

T = TypeVar("T")

TIE = 1e-3
"""Two tokens whose log-probabilities differ by less may change places between two engines."""


class Judge:
    """Compares outcomes with the reference's, and counts what cannot be decided."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def check(self, outcome: Outcome, reference: Outcome) -> None:
        """Raises `AssertionError` where the outcome is not what the request alone gives."""
        name = outcome.client.request.id
        if outcome.client.reads:
            self._check_states(outcome, reference)
            return
        left = outcome.finish is None
        self.counts["left" if left else str(outcome.finish)] += 1
        length = len(outcome.tokens) if left else None
        tie = self._first_difference(outcome, reference.tokens[:length], reference.logprobs)
        if tie:
            self.counts["ties"] += 1
        elif not left:
            assert outcome.finish == reference.finish, name
        if left:
            assert outcome.receipt is None
            return
        if outcome.client.request.plan is None:
            assert outcome.receipt is None, name
            return
        assert outcome.receipt is not None, name
        self._check_receipt(outcome, outcome.receipt)
        if not tie:
            assert reference.receipt is not None
            self._check_same(outcome, outcome.receipt, reference.receipt)

    def _check_states(self, outcome: Outcome, reference: Outcome) -> None:
        self.counts["read"] += 1
        assert outcome.states.keys() == reference.states.keys()
        for point, wanted in reference.states.items():
            told = f"{outcome.client.request.id} at {point}: "
            torch.testing.assert_close(
                outcome.states[point],
                wanted,
                rtol=1e-4,
                atol=1e-4,
                msg=lambda found, told=told: told + found,
            )

    def _first_difference(
        self, outcome: Outcome, tokens: Sequence[int], places: Sequence[TokenLogprob]
    ) -> bool:
        """Whether the two part at a place where the reference saw a tie; raises at any other."""
        name = outcome.client.request.id
        for n, (mine, other) in enumerate(zip(outcome.tokens, tokens, strict=False)):
            if mine != other:
                (first, a), (second, b) = places[n].top[:2]
                assert {mine, other} == {first, second}, f"{name}: token {n}"
                assert abs(a - b) < TIE, f"{name}: token {n} is no tie, {a} and {b}"
                return True
        assert len(outcome.tokens) == len(tokens), name
        for n, (mine, other) in enumerate(zip(outcome.logprobs, places, strict=False)):
            told = f"{name}: token {n} has {mine.logprob}, and {other.logprob} alone"
            assert abs(mine.logprob - other.logprob) <= 1e-4, told
        return False

    def _check_receipt(self, outcome: Outcome, receipt: Receipt) -> None:
        """The receipt against `where` read aloud, token by token."""
        request, name = outcome.client.request, outcome.client.request.id
        assert request.plan is not None
        assert receipt.fingerprint == request.plan.fingerprint
        fed, length = outcome.fed, len(request.prompt)
        assert receipt.tokens_steered + receipt.tokens_skipped == len(fed), name
        assert receipt.tokens_cached <= receipt.tokens_steered, name
        if receipt.tokens_cached:
            self.counts["steered and cached"] += 1
        spec = request.plan.spec
        seen = Seen.of(fed, demo_specs.PIECES, request.roles)
        touched = [
            any(chosen(spec, item, n, length, token, seen) for item in spec.interventions)
            for n, token in enumerate(fed)
        ]
        if request.plan.gated:
            assert receipt.tokens_steered <= sum(touched), name
        else:
            assert receipt.tokens_steered == sum(touched), name

    def _check_same(self, outcome: Outcome, mine: Receipt, other: Receipt) -> None:
        """The receipt against the reference's, which has no prefix cache."""
        name = outcome.client.request.id
        plan = outcome.client.request.plan
        assert plan is not None
        if any(one.gate is not None and one.gate.scope == "token" for one in plan.rules):
            # Whether a token gate opened for a cached token was known when that was computed.
            assert mine.tokens_steered <= other.tokens_steered, name
            for a, b in zip(mine.gates, other.gates, strict=True):
                assert a.fired <= b.fired, name
            return
        uncached = replace(mine, tokens_cached=other.tokens_cached)
        assert plain(uncached.as_json()) == plain(other.as_json()), name


@dataclass
class Report:
    """What a crowd met; `str` of it is one line."""

    outcomes: list[Outcome]
    counts: Counter[str]
    watch: ReceiptGuard

    @property
    def hits(self) -> int:
        """Requests that found a part of their prompt in the prefix cache."""
        return sum(1 for one in self.outcomes if self.watch.hits.get(one.client.request.id))

    def __str__(self) -> str:
        return (
            f"{len(self.outcomes)} requests: {dict(self.counts)}; {len(self.watch.preempted)} "
            f"steered and {self.watch.plain_preempted} plain preemptions, "
            f"{self.watch.resumed_from_cache} resumed from the prefix cache; {self.hits} requests "
            "found their prompt in it"
        )


def simulate(
    engine: VllmEngine,
    reference: Engine,
    plans: Plans,
    *,
    clients: int,
    waves: int,
    seed: int,
    habits: Habits = Habits(),  # noqa: B008 - frozen
) -> Report:
    """Lets a crowd loose on `engine`, and compares what each got with `reference`.

    The reference neither caches prefixes nor preempts. Raises `AssertionError` at a difference.
    """
    crowd, points = Crowd(plans, seed, habits), habits.points
    with watched(engine) as watch:
        for _ in range(waves):
            wave = crowd.wave(clients // waves)
            with together(engine, calls(wave)):
                crowd.met += asyncio.run(serve(engine, wave, points))
    assert_all_free(engine)
    # To their ends, so that a shorter one is a beginning of it.
    whole = [replace(one.client, leaves_after=None) for one in crowd.met]
    whole = [replace(one, streams=one.request.stop is not None) for one in whole]
    judge = Judge()
    wanted = asyncio.run(serve(reference, whole, points))
    for outcome, expected in zip(crowd.met, wanted, strict=True):
        judge.check(outcome, expected)
    return Report(crowd.met, judge.counts, watch)


def outgrow(engine: VllmEngine, reference: Engine, plans: Plans, *, count: int) -> ReceiptGuard:
    """Runs `count` steered requests that fit into the cache as they begin, and do not as they grow,
    so that some are preempted, whoever comes first. Raises `AssertionError` where one is not what
    it is alone.

    Assumes: a cache of no more than `count` + 1 blocks of 32 tokens.
    """
    draw = random.Random(count)
    sampling = SamplingParams(max_tokens=40, temperature=0, logprobs=2, ignore_eos=True)
    steered = [(name, plan) for name, plan in plans.items() if plan is not None]
    clients = [
        Client(
            GenerationRequest(
                f"{n} {name}", tuple(draw.randrange(3, 64) for _ in range(20)), sampling, plan
            ),
            name,
        )
        for n, (name, plan) in enumerate(steered[:count])
    ]
    requests = [one.request for one in clients]
    with watched(engine) as watch:
        found = engine.complete(requests)
    assert_all_free(engine)
    judge = Judge()
    for client, one, other in zip(clients, found, reference.complete(requests), strict=True):
        judge.check(Outcome.of(client, one), Outcome.of(client, other))
    assert judge.counts["ties"] <= 1
    return watch


def ask_twice(engine: VllmEngine, reference: Engine, plans: Plans, *, count: int) -> int:
    """Runs `count` steered requests one by one, each twice: how many found steered tokens in the
    cache. Raises `AssertionError` where one is not what it is alone.

    Assumes: a cache with room for two blocks of 32 tokens.
    """
    draw, judge = random.Random(count), Judge()
    sampling = SamplingParams(max_tokens=2, temperature=0, logprobs=2, ignore_eos=True)
    steered = [(name, plan) for name, plan in plans.items() if plan is not None]
    for name, plan in steered[:count]:
        prompt = tuple(draw.randrange(3, 64) for _ in range(40))
        asked = [GenerationRequest(f"{n} {name}", prompt, sampling, plan) for n in range(2)]
        clients = [Client(one, name) for one in asked]
        [wanted] = reference.complete(asked[:1])
        for client in clients:
            [found] = engine.complete([client.request])
            judge.check(Outcome.of(client, found), Outcome.of(clients[0], wanted))
    assert_all_free(engine)
    return judge.counts["steered and cached"]


# What happens inside vLLM


def core(engine: VllmEngine) -> Any:
    """The engine core, which runs in this process."""
    return engine._driver.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]


def steering(engine: VllmEngine) -> Any:
    """The `WorkerSteering` of the only worker, which runs in this process."""
    return core(engine).model_executor.driver_worker.worker.steering


def in_engine(engine: VllmEngine, work: Callable[[], T]) -> T:
    """Does `work` in the engine's thread, between two steps."""
    future: Future[T] = Future()

    def job() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    engine._driver._inbox.put(job)  # type: ignore[attr-defined]
    return future.result()


@contextmanager
def submissions(engine: VllmEngine) -> Iterator[threading.Semaphore]:
    """Inside the block, the semaphore is released for every call that has reached the engine."""
    driver: Any = engine._driver
    submit, come = driver.submit, threading.Semaphore(0)

    def counted(sequences: Any) -> None:
        submit(sequences)
        come.release()

    driver.submit = counted
    try:
        yield come
    finally:
        del driver.submit


@contextmanager
def together(engine: VllmEngine, calls: int) -> Iterator[None]:
    """Holds an idle engine until `calls` calls have reached it.

    So a crowd is one, however slowly its clients come: who competes with whom for memory does not
    depend on how long a thread waits for its turn.
    """
    with submissions(engine) as come:

        def wait() -> None:
            for _ in range(calls):
                if not come.acquire(timeout=LIVENESS_SECONDS):
                    return  # what is counted afterwards will say so

        engine._driver._inbox.put(wait)  # type: ignore[attr-defined]
        yield


def forget_cache(engine: VllmEngine) -> None:
    """Empties the prefix cache of an idle engine."""
    llm_engine = engine._driver.llm.llm_engine  # type: ignore[attr-defined]
    assert in_engine(engine, llm_engine.reset_prefix_cache)


@dataclass
class ReceiptGuard:
    """What vLLM did with steered and plain requests."""

    preempted: list[str] = field(default_factory=list)
    """Tickets' keys of the steered requests that were preempted, once each time."""
    plain_preempted: int = 0
    resumed_from_cache: int = 0
    """Preempted steered requests that came back to blocks in the prefix cache."""
    hits: dict[str, int] = field(default_factory=dict)
    """By request id, the prompt's tokens that came from the prefix cache."""


@contextmanager
def watched(engine: VllmEngine) -> Iterator[ReceiptGuard]:
    """Watches preemption and the prefix cache while it is open."""
    watch = ReceiptGuard()
    scheduler, take = core(engine).scheduler, RunningSequence.take
    preempt, find = scheduler._preempt_request, scheduler.kv_cache_manager.get_computed_blocks

    def preempt_watched(request: Any, *args: Any, **named: Any) -> Any:
        ticket = ticket_of(request)
        if ticket is None or ticket.plan is None:
            watch.plain_preempted += 1
        else:
            watch.preempted.append(ticket.key)
        return preempt(request, *args, **named)

    def find_watched(request: Any, *args: Any, **named: Any) -> Any:
        found = find(request, *args, **named)
        ticket = ticket_of(request)
        if ticket is not None and ticket.key in watch.preempted and found[1]:
            watch.resumed_from_cache += 1
        return found

    def take_watched(self: RunningSequence, output: Any) -> None:
        if output.num_cached_tokens is not None:
            watch.hits[self.request.id] = output.num_cached_tokens
        take(self, output)

    scheduler._preempt_request = preempt_watched
    scheduler.kv_cache_manager.get_computed_blocks = find_watched
    RunningSequence.take = take_watched  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        del scheduler._preempt_request, scheduler.kv_cache_manager.get_computed_blocks
        RunningSequence.take = take  # type: ignore[method-assign]


@contextmanager
def graphless_steps(engine: VllmEngine) -> Iterator[list[bool]]:
    """For each step while it is open, whether vLLM was told to run it without its graph."""
    from vllm.config import CUDAGraphMode

    runner = core(engine).model_executor.driver_worker.worker.model_runner
    dispatcher, steps = runner.cudagraph_dispatcher, list[bool]()
    dispatch = dispatcher.dispatch

    def dispatch_watched(*args: Any, **named: Any) -> Any:
        steps.append(named["valid_modes"] == {CUDAGraphMode.NONE})
        return dispatch(*args, **named)

    dispatcher.dispatch = dispatch_watched
    try:
        yield steps
    finally:
        del dispatcher.dispatch


def assert_all_free(engine: VllmEngine) -> None:
    """Nothing is left behind: no slot, row, claim on edit rows, or block of the KV cache."""
    stats = engine.stats()
    assert (stats.slots_in_use, stats.requests_running) == (0, 0)
    seats, scheduler = steering(engine).requests, core(engine).scheduler
    assert sorted(seats._free) == list(range(len(seats.ledger.applied)))
    assert scheduler.edit_rows.used == 0
    assert scheduler.get_num_unfinished_requests() == 0
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # the null block is never free
