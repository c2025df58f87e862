"""Many clients of one engine: what they send, and what they get.

Import this module before vllm, as `vllm_engine`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import demo_specs
from artefacts import random_roles
from torch import Tensor
from vllm_engine import Plans

from steer.engines.base import (
    CaptureRequest,
    Completion,
    Engine,
    FinishReason,
    GenerationRequest,
    Receipt,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from steer.model import HookPoint
from steer.prompts.roles import RoleRanges


@dataclass(frozen=True)
class Habits:
    """How much a crowd sends, and what it reads."""

    longest_prompt: int = 150
    longest_start: int = 100
    """Tokens of a prompt that takes up nothing."""
    longest_answer: int = 36
    vocabulary: int = demo_specs.VOCABULARY
    reads: float = 0.0
    """The share of clients who have states of their prompt read, in place of an answer."""
    points: tuple[HookPoint, ...] = ()
    """Where those are read."""


@dataclass(frozen=True)
class Client:
    """A request, and what its sender does: read all at once, stream, leave after some tokens, or
    have the states of its prompt read."""

    request: GenerationRequest
    spec: str
    streams: bool = False
    leaves_after: int | None = None
    reads: bool = False


@dataclass
class Outcome:
    """What a client got; `tokens` include the one that ended the request."""

    client: Client
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    receipt: Receipt | None = None
    states: Mapping[HookPoint, Tensor] = field(default_factory=dict)
    """Of a client who reads, `[tokens, width]` for each hook point."""

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

    def __init__(self, plans: Plans, seed: int, habits: Habits) -> None:
        self.plans = plans
        self.habits = habits
        self.draw = random.Random(seed)
        self._readers, self._speakers = random.Random(seed), random.Random(seed)
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
        prompt = self._tokens(draw.randint(1, self.habits.longest_start))
        kind = draw.random()
        if self.met and kind < 0.3:
            before = draw.choice(self.met[-60:])
            prompt = (*before.client.request.prompt, *before.tokens, *self._tokens(5))
            spec = before.client.spec if draw.random() < 0.5 else spec
        elif self._neighbours and kind < 0.7:
            neighbour = draw.choice(self._neighbours)
            prompt = (*neighbour.request.prompt, *self._tokens(draw.randint(0, 6)))
            spec = neighbour.spec if draw.random() < 0.7 else spec
        prompt = prompt[: self.habits.longest_prompt]
        told = draw.randint(1, self.habits.longest_answer)
        sampling = SamplingParams(max_tokens=told, temperature=0, logprobs=2, ignore_eos=True)
        stop = _every(draw.randint(5, 40)) if draw.random() < 0.15 else None
        leaves = draw.randint(1, 6) if draw.random() < 0.12 else None
        plan = self.plans[spec]
        request = GenerationRequest(
            f"{number} {spec}",
            prompt,
            sampling,
            plan,
            measure=number % 5 == 3,
            stop=stop,
            roles=random_roles(self._speakers, len(prompt)) if number % 2 else None,
        )
        if plan is not None and plan.reads_roles and request.roles is None:
            request = replace(request, roles=RoleRanges(len(prompt), ((0, len(prompt), "user"),)))
        streams = stop is not None or leaves is not None or draw.random() < 0.3
        client = Client(request, spec, streams, leaves)
        if self._readers.random() < self.habits.reads:
            client = Client(replace(request, stop=None), spec, reads=True)
        self._neighbours = [*self._neighbours, client][-4:]
        return client

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.draw.randrange(3, self.habits.vocabulary) for _ in range(count))


def _every(modulus: int) -> Callable[[int], bool]:
    """Stops at tokens that `modulus` divides."""
    return lambda token: token % modulus == 0


def calls(clients: Sequence[Client]) -> int:
    """How many calls of an engine `serve` makes."""
    return 1 + any(one.reads for one in clients) + sum(one.streams for one in clients)


async def serve(
    engine: Engine, clients: Sequence[Client], points: tuple[HookPoint, ...] = ()
) -> list[Outcome]:
    """All clients at once; those who wait for all of their answer share a call, and so do those
    who read."""
    reading = [client for client in clients if client.reads]
    waiting = [client for client in clients if not client.reads and not client.streams]

    def wait() -> list[Outcome]:
        done = engine.complete([client.request for client in waiting])
        return [Outcome.of(client, one) for client, one in zip(waiting, done, strict=True)]

    def read() -> list[Outcome]:
        requests = [client.request for client in reading]
        plans = [request.plan for request in requests]
        asked = CaptureRequest(
            [request.prompt for request in requests],
            points,
            plans=plans,
            roles=[request.roles for request in requests],
        )
        done = engine.capture(asked)
        return [Outcome(one, states=each.states) for one, each in zip(reading, done, strict=True)]

    threads = [asyncio.to_thread(call) for call in ([wait, read] if reading else [wait])]
    streams = [_stream(engine, client) for client in clients if client.streams]
    shared = asyncio.gather(*threads)
    outcomes = [*await asyncio.gather(*streams), *chain(*await shared)]
    found = {id(one.client): one for one in outcomes}
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
