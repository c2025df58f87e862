"""The vLLM engine, as the rest of Steer uses engines: for captures, inspection, fitting, tests.

vLLM's server does not generate through this class: its own routes do. What they have in common are
the tickets, the workers and the receipts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from steer.artefacts.sae.architectures import SUPPORTED
from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    EngineStats,
    GenerationRequest,
    QueriesKeys,
    SamplingParams,
    TokenEvent,
)
from steer.engines.checks import (
    check_attends,
    check_carry,
    check_projection,
    check_readouts,
    check_request,
    check_scores,
)
from steer.engines.listeners import AsyncListener, BlockingListener, Mailbox
from steer.engines.lora import check_lora, refuse_lora
from steer.engines.vllm import plugin
from steer.engines.vllm.front.capturing import (
    capture_order,
    collect,
    project,
    queries_and_keys,
    token_rows,
    unembed,
)
from steer.engines.vllm.front.carrying import CarriedStates
from steer.engines.vllm.front.drivers import ClientDriver, Driver, InlineDriver, LocalDriver
from steer.engines.vllm.front.ends import model_ends
from steer.engines.vllm.front.lora_requests import LoraRequests
from steer.engines.vllm.front.ranks import ask_engines
from steer.engines.vllm.front.sequences import RunningSequence
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.engines.vllm.front.twins import TwinMaker
from steer.engines.vllm.messages import read_info
from steer.engines.vllm.options import REGISTRY_VARIABLE, registry_location
from steer.errors import SteerError, Unsupported
from steer.model import PROJECTED_SITES, SAMPLING, Capabilities, HookPoint, ModelInfo
from steer.plan.plan import check_rules
from steer.prompts.roles import found_roles
from steer.readouts.spec import READOUTS
from steer.registry.blobs.plan_store import PlanStore
from steer.spec import KINDS


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
        max_lora_rank: int | None = None,
    ) -> None:
        """`answers` are what the workers of each engine say to `steer_info`; `ends` are the tokens
        that end an answer; `max_lora_rank` is that of adapters, None where there are none."""
        answer = answers[0][0]
        slots = sum(int(workers[0]["slots"]) for workers in answers)
        self._driver, self.tokenizer, self.tickets, self.ends = driver, tokenizer, issuer, ends
        self._loras = LoraRequests(max_lora_rank)
        self.info = read_info(answer)
        self._passes = int(answer["passes"])
        self.twins = TwinMaker(issuer, self.info)
        self._carried = CarriedStates(driver, self.info, self.capture)
        driver.compare_with(self.twins)
        self.capabilities = Capabilities(
            engine="vllm",
            kinds=KINDS,
            sites=self.info.sites,
            gate_scopes=("prompt", "token", "onward"),
            sae_architectures=SUPPORTED,
            sampling=SAMPLING,
            captures=self.info.sites,
            roles=found_roles(tokenizer),
            projections=tuple(
                site
                for site in PROJECTED_SITES
                if all(site in worker.get("projections", ()) for worker in answers[0])
            ),
            carries=all(worker.get("carries", False) for worker in answers[0]),
            attention=all(worker.get("attention", False) for worker in answers[0]),
            readouts=_readouts(lens=bool(answer.get("lens", False)), engines=len(answers)),
            lora=max_lora_rank is not None,
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
            _max_lora_rank(driver.llm.llm_engine.vllm_config),
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
            _max_lora_rank(llm.llm_engine.vllm_config),
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
            _max_lora_rank(client.vllm_config),
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
        check_readouts(request, self.capabilities)
        check_lora(request, self.capabilities)
        if request.lora is not None:
            self._loras.check(request.lora)
        if request.halt is not None:
            raise Unsupported(
                "requests that detectors end run on vLLM's server, and not in its engine as such",
                code="unsupported",
            )
        if request.plan is not None:
            check_rules(len(request.plan.rules), self._passes)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.admit(request)
        refuse_lora(request)
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
        check_attends(request, self.capabilities)
        for layer in request.attention:
            self.info.check_point(HookPoint(layer, "head_out"), param="/layers")
        plans = request.plans or [None] * len(request.prompts)
        roles = request.roles or [None] * len(request.prompts)
        orders = [capture_order(request, prompt, self.info) for prompt in request.prompts]
        self.start()
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        tickets, running, listeners = [], [], []
        for prompt, plan, order, whose in zip(request.prompts, plans, orders, roles, strict=True):
            generation = GenerationRequest("capture", tuple(prompt), sampling, plan, roles=whose)
            self.admit(generation)
            tickets.append(self.tickets.issue(plan, capture=order, roles=whose))
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
        return collect(self._driver, request, tickets, self.info)

    def unembed(self, states: Tensor) -> Tensor:
        return unembed(self._driver, states, self.info)

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        self.start()
        return token_rows(self._driver, tokens, self.info)

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        check_projection(point, self.info, self.capabilities)
        self.start()
        return project(self._driver, point, states, self.info)

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        check_carry(source, target, self.info, self.capabilities)
        self.start()
        return self._carried(source, target, states, channels)

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        check_scores(layer, self.info, self.capabilities)
        self.start()
        return queries_and_keys(self._driver, layer, states)

    def stats(self) -> EngineStats:
        each = [workers[0] for workers in self._driver.rpc("steer_stats")]
        counts = [name for name, value in each[0].items() if isinstance(value, int)]
        return EngineStats(**{name: sum(one[name] for one in each) for name in counts})

    def _sequence(
        self, request: GenerationRequest, listener: AsyncListener | BlockingListener
    ) -> RunningSequence:
        ticket = None
        if request.plan is not None or request.readouts is not None:
            ticket = self.tickets.issue(
                request.plan,
                measure=request.measure,
                roles=request.roles,
                readouts=request.readouts,
            )
        lora = self._loras.of(request.lora)
        return RunningSequence(request, ticket, listener, self.ends, lora=lora)

    def _mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        if loop not in self._mailboxes:
            self._mailboxes[loop] = Mailbox(loop)
        return self._mailboxes[loop]


def _max_lora_rank(config: Any) -> int | None:
    """The largest rank of adapters that vLLM was started for; None where it serves none, and on a
    CPU with one place alone: there requests without an adapter get that in the last place."""
    lora = getattr(config, "lora_config", None)
    if lora is None or (config.device_config.device_type == "cpu" and lora.max_loras < 2):
        return None
    return int(lora.max_lora_rank)


def _readouts(*, lens: bool, engines: int) -> tuple[str, ...]:
    """What workers read: through the model's head only where it is with its layers and changed by
    no adapter; and of several engines a twin may run on another one than the request."""
    missing = set() if lens else {"kl", "lens"}
    if engines > 1:
        missing.add("kl")
    return tuple(name for name in READOUTS if name not in missing)
