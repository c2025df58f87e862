"""An engine without a model, for tests of everything above the engine.

Text comes from a hash of the prompt and of the plan's fingerprint: the same request always gives
the same words, and a steered one visibly different words. Receipts are counted with the plan's own
selections. Tests may hold the engine back token by token, make it fail, and see what was cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.sae.architectures import SUPPORTED
from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    EngineStats,
    GenerationRequest,
    QueriesKeys,
    TokenEvent,
    TokenLogprob,
)
from steer.engines.checks import (
    check_attends,
    check_carry,
    check_projection,
    check_readouts,
    check_request,
    check_scores,
)
from steer.engines.fake.controls import FakeFailure, Stepper
from steer.engines.fake.script import completion_of, events_of, normal, receipt_of
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.logprobs import following
from steer.engines.readouts import ReadoutJoin
from steer.errors import CapacityError
from steer.model import (
    INNER_SITES,
    PROJECTED_SITES,
    SAMPLING,
    Capabilities,
    HookPoint,
    ModelInfo,
    forward_order,
)
from steer.plan.plan import SteeringPlan
from steer.prompts.roles import found_roles
from steer.readouts.measures import kl_divergence
from steer.readouts.readers import Instruments
from steer.readouts.readings import Readings, ReadSpan, RequestReadouts
from steer.readouts.spec import READOUTS
from steer.spec import KINDS, SITES


def fake_model(**changes: Any) -> ModelInfo:
    """A small model's shape; `changes` replaces fields."""
    shape = ModelInfo(
        name="fake-model",
        architecture="FakeForCausalLM",
        n_layers=6,
        d_model=16,
        vocab_size=ByteTokenizer.vocab_size,
        max_length=512,
        sites=SITES,
        d_mlp=32,
        n_heads=4,
        head_dim=4,
    )
    return replace(shape, **changes)


class FakeEngine:
    """See `steer.engines.base.Engine`; everything is decided by hashes.

    `stepper` holds tokens back until it allows them; `failure` makes requests fail. `counts` has
    started, finished, cancelled and failed requests.
    """

    def __init__(
        self,
        info: ModelInfo | None = None,
        *,
        slots: int = 64,
        stepper: Stepper | None = None,
        failure: FakeFailure | None = None,
    ) -> None:
        self.info = info or fake_model()
        tokenizer = ByteTokenizer()
        self.capabilities = Capabilities(
            engine="fake",
            kinds=KINDS,
            sites=self.info.sites,
            sae_architectures=SUPPORTED,
            sampling=SAMPLING,
            captures=self.info.sites,
            projections=tuple(site for site in PROJECTED_SITES if site in self.info.sites),
            carries=True,
            roles=found_roles(tokenizer),
            readouts=READOUTS,
            lora=True,
            limits={"slots": slots},
        )
        self.tokenizer: Any = tokenizer
        self.stepper, self.failure = stepper, failure
        self.counts: Counter[str] = Counter()
        self.seen: list[GenerationRequest] = []
        self.running = False
        self._slots = slots
        self._held: Counter[str] = Counter()
        self._changed = threading.Condition()

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def admit(self, request: GenerationRequest) -> None:
        check_request(request, self.info, self.info.max_length)
        check_readouts(request, self.capabilities)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.admit(request)
        outcome = "cancelled"
        self._begin(request)
        try:
            for event in self._read(request):
                if self.stepper is not None:
                    await self.stepper.wait()
                yield event
                await asyncio.sleep(0)
            outcome = "finished"
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._end(request, outcome)

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        done = []
        for request in requests:
            self.admit(request)
            self._begin(request)
            outcome = "failed"
            try:
                events = list(self._read(request))
                outcome = "finished"
            finally:
                self._end(request, outcome)
            done.append(completion_of(events))
        return done

    def capture(self, request: CaptureRequest) -> list[Captured]:
        check_attends(request, self.capabilities)
        plans = request.plans or [None] * len(request.prompts)
        return [
            self._captured(request, tuple(prompt), plan)
            for prompt, plan in zip(request.prompts, plans, strict=True)
        ]

    def unembed(self, states: Tensor) -> Tensor:
        return states.float() @ self._output_matrix().T

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        matrix = self._output_matrix()
        return matrix[list(tokens)] - matrix.mean(0)

    def _output_matrix(self) -> Tensor:
        return normal("unembed", (self.info.vocab_size, self.info.d_model))

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        check_projection(point, self.info, self.capabilities)
        matrix = normal(f"project {point}", (self.info.d_model, self.info.width(point.site)))
        return states.float() @ matrix.T

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        made = self._carried(source, target, states)
        return made if channels is None else made[:, channels.start : channels.stop]

    def _carried(self, source: HookPoint, target: HookPoint, states: Tensor) -> Tensor:
        check_carry(source, target, self.info, self.capabilities)
        if source.site in PROJECTED_SITES and target.site == INNER_SITES[source.site]:
            return self.project(source, states)
        shape = self.info.width(target.site), self.info.width(source.site)
        return states.float() @ normal(f"carry {source} {target}", shape).T

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        check_scores(layer, self.info, self.capabilities)
        heads, width = self.info.n_heads or 1, self.info.head_dim or 1
        shape = heads * width, self.info.d_model
        queries, keys = (
            (states.float() @ normal(f"{name} {layer}", shape).T).reshape(-1, heads, width)
            for name in ("queries", "keys")
        )
        return QueriesKeys(queries, keys)

    def stats(self) -> EngineStats:
        with self._changed:
            running = self.counts["started"] - sum(
                self.counts[key] for key in ("finished", "cancelled", "failed")
            )
            return EngineStats(
                slots=self._slots, slots_in_use=len(+self._held), requests_running=running
            )

    def wait_for(self, outcome: str, count: int = 1, timeout: float = 10.0) -> bool:
        """Blocks until `count` requests have ended so; False when `timeout` seconds pass first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.counts[outcome] >= count, timeout)

    def _begin(self, request: GenerationRequest) -> None:
        with self._changed:
            key = request.plan.fingerprint if request.plan else None
            if key is not None and key not in self._held and len(+self._held) >= self._slots:
                raise CapacityError(f"all {self._slots} slots are taken: try again")
            if key is not None:
                self._held[key] += 1
            self.seen.append(request)
            self._count("started")

    def _end(self, request: GenerationRequest, outcome: str) -> None:
        with self._changed:
            if request.plan is not None:
                self._held[request.plan.fingerprint] -= 1
                self._held = +self._held
            self._count(outcome)

    def _count(self, what: str) -> None:
        self.counts[what] += 1
        self._changed.notify_all()

    def _read(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        """The events of one request, with what is read of its tokens."""
        if request.readouts is None:
            yield from events_of(request, self.info.max_length, self.failure)
            return
        halted = False

        def stop(token: int) -> bool:
            return not halted and request.stop is not None and request.stop(token)

        listened = replace(request, stop=stop)
        events = events_of(listened, self.info.max_length, self.failure)
        readouts = RequestReadouts(request.readouts, len(request.prompt))
        joined = ReadoutJoin(readouts)
        tools = Instruments(torch.device("cpu"), self.unembed, vocab_size=self.info.vocab_size)
        tokens, fed = list(request.prompt), 0
        while True:
            span = ReadSpan(readouts, 0, fed, len(tokens) - fed)
            readings = Readings.of([span], tools)
            if readings is not None:
                for point in readings.points:
                    before, after = (
                        self._states(point, tuple(tokens), range(fed, len(tokens)), plan)
                        for plan in (None, request.plan)
                    )
                    readings.see(point, before, after)
                readings.finish()
            fed = len(tokens)
            rows = tuple(joined.take(tokens.__getitem__, fed, last=False))
            halted = request.halt is not None and request.halt(rows)
            event = next(events)
            if request.readouts.kl:
                joined.chosen(fed, self._divergence(request, tokens))
            tokens.append(event.token)
            if halted:
                receipt = receipt_of(request, tokens[len(request.prompt) :])
                event = replace(event, finish="content_filter", receipt=receipt)
            rows += tuple(joined.take(tokens.__getitem__, fed, last=event.finish is not None))
            yield replace(event, readouts=rows)
            if event.finish is not None:
                return

    def _divergence(self, request: GenerationRequest, tokens: Sequence[int]) -> float:
        """KL of what the plan makes of the next token from what would be said without it."""
        last, place = HookPoint(self.info.n_layers - 1), [len(tokens) - 1]
        steered, plain = (
            self.unembed(self._states(last, tuple(tokens), place, plan))
            for plan in (request.plan, None)
        )
        return float(kl_divergence(steered, plain))

    def _captured(
        self, request: CaptureRequest, prompt: tuple[int, ...], plan: SteeringPlan | None
    ) -> Captured:
        wanted = request.positions if request.positions is not None else range(len(prompt))
        places = [range(len(prompt))[place] for place in wanted]
        last = HookPoint(self.info.n_layers - 1)
        states = {point: self._states(point, prompt, places, plan) for point in request.points}
        logits = None
        logprobs: tuple[TokenLogprob, ...] = ()
        read = request.read_for_logits(len(prompt))
        if read:
            every = self.unembed(self._states(last, prompt, list(read), plan))
            logits = request.kept_logits(every)
            if request.logprobs is not None:
                logprobs = tuple(following(every, prompt[read.start + 1 :], request.logprobs))
        return Captured(states, logits, logprobs)

    def _states(
        self,
        point: HookPoint,
        prompt: tuple[int, ...],
        places: Sequence[int],
        plan: SteeringPlan | None,
    ) -> Tensor:
        """Rows `[positions, width]` that depend on the tokens so far and on the edits so far."""
        width = self.info.width(point.site)
        mark = ""
        if plan and any(forward_order(p) <= forward_order(point) for p in plan.points):
            mark = plan.fingerprint
        rows = [normal(f"{point}{prompt[: place + 1]}{mark}", (width,)) for place in places]
        return torch.stack(rows) if rows else torch.zeros(0, width)
