"""The vLLM engine, as the rest of Steer uses engines: for captures, inspection, fitting, tests.

vLLM's server does not generate through this class: its own routes do. What they have in common are
the tickets, the workers and the receipts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steer.artefacts.sae.architectures import SUPPORTED
from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    EngineStats,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from steer.engines.checks import check_captured, check_request, not_finite
from steer.engines.listeners import AsyncListener, BlockingListener, Mailbox
from steer.engines.logprobs import following
from steer.engines.vllm import plugin
from steer.engines.vllm.front.drivers import ClientDriver, Driver, InlineDriver, LocalDriver
from steer.engines.vllm.front.ends import model_ends
from steer.engines.vllm.front.ranks import ask_engines
from steer.engines.vllm.front.sequences import RunningSequence
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.engines.vllm.messages import pack, read_info, unpack
from steer.engines.vllm.options import REGISTRY_VARIABLE, registry_location
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import NotFinite, SpecError, SteerError, TooLarge, Unsupported
from steer.model import SAMPLING, Capabilities, HookPoint, ModelInfo
from steer.plan.plan import check_rules
from steer.registry.blobs.plan_store import PlanStore
from steer.spec import KINDS

MAX_CAPTURE_BYTES = 1 << 30


class VllmEngine:
    """An `Engine` over a vLLM engine that was started with the plugin."""

    info: ModelInfo
    capabilities: Capabilities
    tokenizer: Any

    def __init__(
        self,
        driver: Driver,
        tokenizer: Any,
        answers: Sequence[Sequence[Any]],
        issuer: TicketIssuer,
        ends: frozenset[int],
    ) -> None:
        """`answers` are what the workers of each engine say to `steer_info`; `ends` are the tokens
        that end an answer."""
        answer = answers[0][0]
        slots = sum(int(workers[0]["slots"]) for workers in answers)
        self._driver, self.tokenizer, self.tickets, self.ends = driver, tokenizer, issuer, ends
        self.info = read_info(answer)
        self._passes = int(answer["passes"])
        self.capabilities = Capabilities(
            engine="vllm",
            kinds=KINDS,
            sites=self.info.sites,
            gate_scopes=("prompt", "token"),
            sae_architectures=SUPPORTED,
            sampling=SAMPLING,
            captures=self.info.sites,
            limits={"slots": slots, "passes": self._passes, "batch": slots},
        )
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()

    @classmethod
    def load(cls, *, registry: str | Path | None = None, **options: Any) -> VllmEngine:
        """Starts vLLM in this process; `options` are those of vLLM's `LLM`.

        Raises `Unsupported` for what cannot be steered; the plugin must be named in VLLM_PLUGINS.
        """
        if registry is not None:
            os.environ[REGISTRY_VARIABLE] = str(registry)
        if not plugin.named():
            raise Unsupported(
                "the plugin is not active: set the environment variable VLLM_PLUGINS=steer before "
                "vLLM is imported",
                code="plugin_not_named",
            )
        plugin.register()

        def make() -> Any:
            from vllm import LLM  # noqa: PLC0415 (imports half of torch)

            return LLM(**options)

        driver = LocalDriver(make)
        return cls(
            driver,
            driver.llm.get_tokenizer(),
            driver.rpc("steer_info"),
            TicketIssuer(PlanStore(registry_location())),
            model_ends(driver.llm.llm_engine.vllm_config, driver.llm.get_tokenizer()),
        )

    @classmethod
    def of_llm(cls, llm: Any) -> VllmEngine:
        """Over an `LLM` that was made with the plugin; everything runs in the caller's thread."""
        driver = InlineDriver(llm)
        return cls(
            driver,
            llm.get_tokenizer(),
            driver.rpc("steer_info"),
            TicketIssuer(PlanStore(registry_location())),
            model_ends(llm.llm_engine.vllm_config, llm.get_tokenizer()),
        )

    @classmethod
    async def of_client(cls, client: Any, tokenizer: Any) -> VllmEngine:
        """Over vLLM's `EngineClient`, from its event loop; the synchronous methods are then called
        from other threads."""
        return cls(
            ClientDriver(client, asyncio.get_running_loop()),
            tokenizer,
            await ask_engines(client, "steer_info"),
            TicketIssuer(PlanStore(registry_location())),
            model_ends(client.vllm_config, tokenizer),
        )

    def start(self) -> None:
        """vLLM's workers proved that steering acts when they started."""
        self._driver.start()

    def stop(self) -> None:
        self._driver.stop()

    def __enter__(self) -> VllmEngine:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def admit(self, request: GenerationRequest) -> None:
        """Raises where `request` can never run here."""
        check_request(request, self.info, self.info.max_length)
        if request.plan is not None:
            check_rules(len(request.plan.rules), self._passes)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.admit(request)
        self.start()
        listener = AsyncListener(self._mailbox())
        sequence = self._sequence(request, listener)
        self._driver.submit([sequence])
        try:
            while True:
                item = await listener.queue.get()
                if isinstance(item, SteerError):
                    raise item
                yield item
                if item.finish:
                    return
        finally:
            self._driver.cancel(sequence)

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        for request in requests:
            self.admit(request)
        self.start()
        listeners = [BlockingListener() for _ in requests]
        running = [
            self._sequence(request, listener)
            for request, listener in zip(requests, listeners, strict=True)
        ]
        self._driver.submit(running)
        try:
            return [listener.result() for listener in listeners]
        finally:
            for sequence in running:
                self._driver.cancel(sequence)

    def capture(self, request: CaptureRequest) -> list[Captured]:
        for point in request.points:
            self.info.check_point(point)
        plans = request.plans or [None] * len(request.prompts)
        orders = [self._order(request, prompt) for prompt in request.prompts]
        self.start()
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        tickets, running, listeners = [], [], []
        for prompt, plan, order in zip(request.prompts, plans, orders, strict=True):
            generation = GenerationRequest("capture", tuple(prompt), sampling, plan)
            self.admit(generation)
            tickets.append(self.tickets.issue(plan, capture=order))
            listeners.append(BlockingListener())
            running.append(
                RunningSequence(generation, tickets[-1], listeners[-1], self.ends, quiet=True)
            )
        self._driver.submit(running)
        try:
            for listener in listeners:
                listener.result()
        finally:
            for sequence in running:
                self._driver.cancel(sequence)
        return [
            self._captured(request, ticket, prompt)
            for ticket, prompt in zip(tickets, request.prompts, strict=True)
        ]

    def unembed(self, states: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        answers = self._driver.rpc("steer_unembed", pack(rows))
        data = next(answer for answer in chain(*answers) if answer is not None)
        return unpack(data, self.info.vocab_size).reshape(*states.shape[:-1], -1)

    def stats(self) -> EngineStats:
        each = [workers[0] for workers in self._driver.rpc("steer_stats")]
        counts = [name for name, value in each[0].items() if isinstance(value, int)]
        return EngineStats(**{name: sum(one[name] for one in each) for name in counts})

    def _sequence(
        self, request: GenerationRequest, listener: AsyncListener | BlockingListener
    ) -> RunningSequence:
        ticket = None
        if request.plan is not None:
            ticket = self.tickets.issue(request.plan, measure=request.measure)
        return RunningSequence(request, ticket, listener, self.ends)

    def _order(self, request: CaptureRequest, prompt: Sequence[int]) -> CaptureOrder:
        positions = _positions(request, len(prompt))
        points = dict.fromkeys(request.points)
        read = request.read_for_logits(len(prompt))
        if read:
            points[self._last] = None
            positions = (*positions, *(one for one in read if one not in set(positions)))
        size = 4 * len(positions) * sum(self.info.width(point.site) for point in points)
        if size > MAX_CAPTURE_BYTES:
            raise TooLarge(
                f"the states of {len(points)} hook points at {len(positions)} positions are "
                f"{size >> 20} MiB and {MAX_CAPTURE_BYTES >> 20} MiB are allowed: choose fewer "
                "positions or points",
                param="/positions",
            )
        return CaptureOrder(tuple(points), positions)

    def _captured(self, request: CaptureRequest, ticket: Ticket, prompt: Sequence[int]) -> Captured:
        order, length = ticket.capture, len(prompt)
        assert order is not None
        found: dict[str, bytes] = {}
        for answer in chain(*self._driver.rpc("steer_captured", ticket.key)):
            found |= answer
        if NotFinite.code in found:
            raise not_finite("the states", steered=ticket.plan is not None)
        states = {
            point: unpack(found[str(point)], self.info.width(point.site)) for point in order.points
        }
        for point, rows in states.items():
            if torch.isneginf(rows).all(-1).any():
                raise SteerError(f"no state passed {point} at some of the positions asked for")
        place = {position: row for row, position in enumerate(order.positions)}
        kept = [place[position] for position in _positions(request, length)]
        logits = None
        logprobs: tuple[TokenLogprob, ...] = ()
        read = request.read_for_logits(length)
        if read:
            every = self.unembed(states[self._last][[place[position] for position in read]])
            logits = request.kept_logits(every)
            if request.logprobs is not None:
                logprobs = tuple(following(every, prompt[read.start + 1 :], request.logprobs))
        wanted_states = {point: states[point][kept] for point in request.points}
        captured = Captured(wanted_states, logits, logprobs)
        check_captured(captured, steered=ticket.plan is not None)
        return captured

    @property
    def _last(self) -> HookPoint:
        return HookPoint(self.info.n_layers - 1, "resid_post")

    def _mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        if loop not in self._mailboxes:
            self._mailboxes[loop] = Mailbox(loop)
        return self._mailboxes[loop]


def _positions(request: CaptureRequest, length: int) -> tuple[int, ...]:
    """The absolute positions in a prompt of `length` tokens whose states are asked for."""
    positions = request.positions
    if positions is None:
        return tuple(range(length)) if request.points else ()
    for position in positions:
        if not -length <= position < length:
            raise SpecError(
                f"position {position} is outside a prompt of {length} tokens",
                code="position_out_of_range",
                param="/positions",
            )
    return tuple(position % length for position in positions)
