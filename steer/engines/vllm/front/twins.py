"""`kl`: the unsteered twin of a request that has been answered.

Workers keep the states that its tokens were chosen from. The twin is a capture of the same tokens
without the plan, and workers compare the two: only a number for each token comes back.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from steer.engines.base import GenerationRequest, SamplingParams, TokenEvent, TokenReadout
from steer.engines.vllm.front.ranks import ask_engines
from steer.engines.vllm.front.sequences import RunningSequence, vllm_sampling
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import EngineError, SteerError
from steer.model import ModelInfo
from steer.readouts.twins import chosen_at

Answers = Iterable[Mapping[str, Any] | None]
"""What the workers of all engines say to `steer_divergences` of one twin."""


@dataclass(frozen=True)
class Twin:
    """The tokens that one `choice` of the ticket `key` has `said` behind its `prompt`, for a pass
    under a `ticket` of its own."""

    key: str
    choice: int
    prompt: tuple[int, ...]
    said: tuple[int, ...]
    ticket: Ticket

    @property
    def asked(self) -> tuple[str, int, int, str]:
        """What `steer_divergences` is asked: the last token was never fed."""
        return self.key, self.choice, len(self.prompt) + len(self.said) - 1, self.ticket.key

    def running(self, listener: Any) -> RunningSequence:
        """The pass, as a request whose end `listener` hears of."""
        request = GenerationRequest(
            f"twin-{uuid.uuid4().hex}",
            (*self.prompt, *self.said[:-1]),
            SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
        )
        return RunningSequence(request, self.ticket, listener, frozenset(), quiet=True)

    def read(self, answers: Answers) -> list[TokenReadout]:
        """The divergence of each token that was said. Raises `EngineError` where there is none."""
        found = [one for one in answers if one is not None]
        for one in found or [{"error": "no worker kept the states of this request"}]:
            if "error" in one:
                code = str(one.get("code", "readouts_missed"))
                raise EngineError(str(one["error"]), code=code)
        start = len(self.prompt)
        return [
            TokenReadout(start + n, token, (), kl)
            for n, (token, kl) in enumerate(zip(self.said, found[0]["kl"], strict=True))
        ]


@dataclass(frozen=True)
class TwinMaker:
    """Makes twins for one engine."""

    issuer: TicketIssuer
    info: ModelInfo

    def of(self, key: str, choice: int, prompt: Sequence[int], said: Sequence[int]) -> Twin:
        """The twin of a choice that was answered under the ticket `key`."""
        fed = range(len(prompt) - 1, len(prompt) + len(said) - 1)
        order = CaptureOrder((chosen_at(self.info),), tuple(fed))
        ticket = self.issuer.issue(None, capture=order)
        return Twin(key, choice, tuple(prompt), tuple(said), ticket)


@dataclass(frozen=True)
class TwinListener:
    """Hears of a twin's end, within the engine's thread."""

    done: Callable[[], None]
    failed: Callable[[SteerError], None]

    def put(self, event: TokenEvent) -> None:
        if event.finish is not None:
            self.done()

    def fail(self, error: SteerError) -> None:
        self.failed(error)

    def flush(self) -> None:
        """Nobody waits."""


async def compared(
    client: Any, generate: Callable[..., AsyncGenerator[Any, None]], twin: Twin, **named: Any
) -> list[TokenReadout]:
    """Runs `twin` through vLLM's `EngineClient`, with its `generate` and what else that is to be
    given, and gives the divergences. Raises `EngineError`."""
    running = twin.running(None)
    prompt = {"prompt_token_ids": list(running.request.prompt)}
    outputs = generate(prompt, vllm_sampling(running), running.key, **named)
    answers = None
    try:
        async with aclosing(outputs):
            async for _ in outputs:
                pass
        answers = await ask_engines(client, "steer_divergences", [twin.asked])
    finally:
        if answers is None:  # workers forget what nobody will compare
            with suppress(Exception):
                await asyncio.shield(ask_engines(client, "steer_captured", [twin.ticket.key]))
    return twin.read(one for worker in chain(*answers) for one in worker)
