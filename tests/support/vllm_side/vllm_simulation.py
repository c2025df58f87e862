"""Many clients of one small vLLM engine: what they send, what came of it, what it should be.

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
from float64_reference import chosen
from liveness import LIVENESS_SECONDS
from vllm_engine import Plans, plain

from steer.engines.base import (
    Completion,
    Engine,
    FinishReason,
    GenerationRequest,
    Receipt,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from steer.engines.vllm.core.cache_keys import ticket_of
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.front.sequences import RunningSequence

T = TypeVar("T")

LONGEST_PROMPT = 150
TIE = 1e-3
"""Two tokens whose log-probabilities differ by less may change places between two engines."""


@dataclass(frozen=True)
class Client:
    """A request, and what its sender does: read all at once, stream, or leave after some tokens."""

    request: GenerationRequest
    spec: str
    streams: bool = False
    leaves_after: int | None = None


@dataclass
class Outcome:
    """What a client got; `tokens` include the one that ended the request."""

    client: Client
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    receipt: Receipt | None = None

    @staticmethod
    def of(client: Client, done: Completion) -> Outcome:
        """`done` keeps back the token that ended it with "stop", and not its log-probability."""
        assert client.request.stop is None
        tokens = list(done.tokens)
        return Outcome(client, tokens, list(done.logprobs), done.finish, done.receipt)

    def take(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the last"
        self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.finish, self.receipt = event.finish, event.receipt

    @property
    def fed(self) -> list[int]:
        return [*self.client.request.prompt, *self.tokens[:-1]]


class Crowd:
    """Draws clients in waves; later ones take up what earlier ones were told."""

    def __init__(self, plans: Plans, seed: int) -> None:
        self.plans = plans
        self.draw = random.Random(seed)
        self.met: list[Outcome] = []
        self._count = 0
        self._neighbours: list[Client] = []
        """The last clients drawn: some of the next ones send what they sent, and more."""

    def wave(self, size: int) -> list[Client]:
        return [self._client() for _ in range(size)]

    def _client(self) -> Client:
        draw, number = self.draw, self._count
        self._count += 1
        names = list(self.plans)
        spec = names[number % len(names)]
        prompt = self._tokens(draw.randint(1, 100))
        kind = draw.random()
        if self.met and kind < 0.3:
            before = draw.choice(self.met[-60:])
            prompt = (*before.client.request.prompt, *before.tokens, *self._tokens(5))
            spec = before.client.spec if draw.random() < 0.5 else spec
        elif self._neighbours and kind < 0.7:
            neighbour = draw.choice(self._neighbours)
            prompt = (*neighbour.request.prompt, *self._tokens(draw.randint(0, 6)))
            spec = neighbour.spec if draw.random() < 0.7 else spec
        prompt = prompt[:LONGEST_PROMPT]
        sampling = SamplingParams(
            max_tokens=draw.randint(1, 36), temperature=0, logprobs=2, ignore_eos=True
        )
        stop = _every(draw.randint(5, 40)) if draw.random() < 0.15 else None
        leaves = draw.randint(1, 6) if draw.random() < 0.12 else None
        request = GenerationRequest(
            f"{number} {spec}",
            prompt,
            sampling,
            self.plans[spec],
            measure=number % 5 == 3,
            stop=stop,
        )
        streams = stop is not None or leaves is not None or draw.random() < 0.3
        client = Client(request, spec, streams, leaves)
        self._neighbours = [*self._neighbours, client][-4:]
        return client

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.draw.randrange(3, demo_specs.VOCABULARY) for _ in range(count))


def _every(modulus: int) -> Callable[[int], bool]:
    """Stops at tokens that `modulus` divides."""
    return lambda token: token % modulus == 0


async def serve(engine: Engine, clients: Sequence[Client]) -> list[Outcome]:
    """All clients at once; those who do not stream share one call of `complete`."""
    waiting = [client for client in clients if not client.streams]

    def wait() -> list[Outcome]:
        done = engine.complete([client.request for client in waiting])
        return [Outcome.of(client, one) for client, one in zip(waiting, done, strict=True)]

    streams = [_stream(engine, client) for client in clients if client.streams]
    together, *streamed = await asyncio.gather(asyncio.to_thread(wait), *streams)
    found = {id(one.client): one for one in [*together, *streamed]}
    return [found[id(client)] for client in clients]


async def _stream(engine: Engine, client: Client) -> Outcome:
    outcome = Outcome(client)
    events = engine.generate(client.request)
    async for event in events:
        outcome.take(event)
        if len(outcome.tokens) == client.leaves_after:
            break
    await events.aclose()  # type: ignore[attr-defined]
    return outcome


class Judge:
    """Compares outcomes with the reference's, and counts what cannot be decided."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def check(self, outcome: Outcome, reference: Outcome) -> None:
        """Raises `AssertionError` where the outcome is not what the request alone gives."""
        name = outcome.client.request.id
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
        touched = [
            any(chosen(spec, item, n, length, token) for item in spec.interventions)
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
        if any(one.gate is not None and not one.gate.prompt_scope for one in plan.rules):
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
    engine: VllmEngine, reference: Engine, plans: Plans, *, clients: int, waves: int, seed: int
) -> Report:
    """Lets a crowd loose on `engine`, and compares what each got with `reference`.

    The reference neither caches prefixes nor preempts. Raises `AssertionError` at a difference.
    """
    crowd = Crowd(plans, seed)
    with watched(engine) as watch:
        for _ in range(waves):
            wave = crowd.wave(clients // waves)
            # Those who do not stream share a call.
            with together(engine, 1 + sum(client.streams for client in wave)):
                crowd.met += asyncio.run(serve(engine, wave))
    assert_all_free(engine)
    # To their ends, so that a shorter one is a beginning of it.
    whole = [replace(one.client, leaves_after=None) for one in crowd.met]
    whole = [replace(one, streams=one.request.stop is not None) for one in whole]
    judge = Judge()
    for outcome, expected in zip(crowd.met, asyncio.run(serve(reference, whole)), strict=True):
        judge.check(outcome, expected)
    return Report(crowd.met, judge.counts, watch)


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

    def find_watched(request: Any) -> Any:
        found = find(request)
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
