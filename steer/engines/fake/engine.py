"""An engine without a model, for tests of everything above the engine.

Text comes from a hash of the prompt and of the plan's fingerprint: the same request always gives
the same words, and a steered one visibly different words. Receipts are counted with the plan's own
selections. Tests may hold the engine back token by token, make it fail, and see what was cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.artefacts.sae.architectures import SUPPORTED
from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    EngineStats,
    GateReceipt,
    GenerationRequest,
    PointReceipt,
    RampReceipt,
    Receipt,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from steer.engines.checks import (
    check_attends,
    check_carry,
    check_projection,
    check_readouts,
    check_request,
)
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.logprobs import following
from steer.engines.readouts import ReadoutJoin
from steer.errors import CapacityError, EngineError
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
from steer.plan.selection import trace_of
from steer.prompts.roles import found_roles
from steer.readouts.measures import kl_divergence
from steer.readouts.readers import Instruments
from steer.readouts.readings import Readings, ReadSpan, RequestReadouts
from steer.readouts.spec import READOUTS
from steer.spec import KINDS, SITES

_PLAIN = ("the", "river", "runs", "past", "a", "small", "café", "and", "rain", "falls", "today")
_STEERED = (
    "joy",
    "naïve",
    "日本",
    "sparkle",
    "🙂",
    "bright",
    "über",
    "sunny",
    "party",
    "🎈🎈",
    "wow",
)
_RELATIVE_SIZE = 0.125


class Stepper:
    """Lets tokens through one by one: `allow(3)` from any thread lets three out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._permits = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def allow(self, tokens: int = 1) -> None:
        """Lets `tokens` more tokens out, over all requests."""
        with self._lock:
            self._permits += tokens
            woken, self._waiting = self._waiting, []
        for loop, future in woken:
            loop.call_soon_threadsafe(_wake, future)

    async def wait(self) -> None:
        """Returns once a token may go out."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if self._permits:
                    self._permits -= 1
                    return
                future: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, future))
            await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _everybody(_: GenerationRequest) -> bool:
    return True


@dataclass(frozen=True)
class FakeFailure:
    """What goes wrong: raise `error` after `after` tokens of the requests that `of` is true for."""

    after: int = 0
    error: Exception = field(
        default_factory=lambda: EngineError("the fake engine was told to fail")
    )
    of: Callable[[GenerationRequest], bool] = _everybody


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
            done.append(_completion(events))
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
        return _normal("unembed", (self.info.vocab_size, self.info.d_model))

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        check_projection(point, self.info, self.capabilities)
        matrix = _normal(f"project {point}", (self.info.d_model, self.info.width(point.site)))
        return states.float() @ matrix.T

    def carry(self, source: HookPoint, target: HookPoint, states: Tensor) -> Tensor:
        check_carry(source, target, self.info, self.capabilities)
        if source.site in PROJECTED_SITES and target.site == INNER_SITES[source.site]:
            return self.project(source, states)
        shape = self.info.width(target.site), self.info.width(source.site)
        return states.float() @ _normal(f"carry {source} {target}", shape).T

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
            yield from _events(request, self.info.max_length, self.failure)
            return
        halted = False

        def stop(token: int) -> bool:
            return not halted and request.stop is not None and request.stop(token)

        listened = replace(request, stop=stop)
        events = _events(listened, self.info.max_length, self.failure)
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
                receipt = _receipt(request, tokens[len(request.prompt) :])
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
        rows = [_normal(f"{point}{prompt[: place + 1]}{mark}", (width,)) for place in places]
        return torch.stack(rows) if rows else torch.zeros(0, width)


def _events(
    request: GenerationRequest, max_length: int, failure: FakeFailure | None
) -> Iterator[TokenEvent]:
    """The events of one request; asks `request.stop` after every token."""
    limit = min(request.sampling.max_tokens, max_length - len(request.prompt))
    generated: list[int] = []
    for token in _script(request):
        if failure is not None and len(generated) == failure.after and failure.of(request):
            raise failure.error
        generated.append(token)
        ends = _is_end(token, request.sampling) and len(generated) > request.sampling.min_tokens
        stopped = not ends and request.stop is not None and request.stop(token)
        logprob = _logprob(request, len(generated), token)
        if ends or stopped:
            yield TokenEvent(token, logprob, "stop", _receipt(request, generated))
            return
        if len(generated) == limit:
            yield TokenEvent(token, logprob, "length", _receipt(request, generated))
            return
        yield TokenEvent(token, logprob)


def _is_end(token: int, sampling: SamplingParams) -> bool:
    if token in sampling.stop_token_ids:
        return True
    return token == ByteTokenizer.eos_token_id and not sampling.ignore_eos


def _script(request: GenerationRequest) -> Iterator[int]:
    """Six to thirteen words, then end-of-sequence, for ever."""
    seed = "greedy" if request.sampling.temperature == 0 else str(request.sampling.seed)
    mark = request.plan.fingerprint if request.plan else ""
    mark += request.lora.sha256 if request.lora else ""
    key = f"{request.prompt}{mark}{seed}"
    words = _STEERED if request.plan and request.plan.points else _PLAIN
    for place in range(6 + _number(key) % 8):
        word = words[_number(f"{key}{place}") % len(words)]
        yield from (" " * (place > 0) + word).encode()
    while True:
        yield ByteTokenizer.eos_token_id


def _receipt(request: GenerationRequest, generated: Sequence[int]) -> Receipt | None:
    """Counted with the selections of the plan; every gate is open."""
    plan = request.plan
    if plan is None:
        return None
    fed = np.array([*request.prompt, *generated[:-1]], dtype=np.int64)
    places = np.arange(len(fed))
    trace = trace_of(plan.selections, request.prompt, request.roles)
    if trace is not None:
        trace.read(len(request.prompt), fed[len(request.prompt) :])
    any_mask = np.zeros(len(fed), dtype=bool)
    at_point: dict[HookPoint, Any] = {}
    gates: dict[str, int] = {}
    ramps: list[RampReceipt] = []
    for one in plan.rules:
        mask = one.selection.mask(places, len(request.prompt), fed, trace)
        ramp = one.selection.ramp
        if ramp is not None:
            factors = ramp.factors(places, len(request.prompt))[mask]
            mean = float(factors.mean()) if len(factors) else None
            ramps.append(RampReceipt(ramp.points, len(factors), mean))
        any_mask |= mask
        for point in one.blocks:
            at_point[point] = at_point.get(point, np.zeros(len(fed), dtype=bool)) | mask
        if one.gate is not None:
            gates[one.gate.name] = int(mask.sum())
    steered = int(any_mask.sum())
    return Receipt(
        fingerprint=plan.fingerprint,
        tokens_steered=steered,
        tokens_skipped=len(fed) - steered,
        hook_points=tuple(
            PointReceipt(p, int(at_point[p].sum()), _RELATIVE_SIZE if request.measure else None)
            for p in plan.points
        ),
        gates=tuple(GateReceipt(name, fired, 0.5) for name, fired in gates.items()),
        strengths=plan.resolved_strengths,
        concepts=plan.explanations,
        ramps=tuple(ramps),
    )


def _logprob(request: GenerationRequest, place: int, token: int) -> TokenLogprob | None:
    wanted = request.sampling.logprobs
    if wanted is None:
        return None
    first = -(1 + _number(f"{place}{token}") % 100) / 100
    others = [(token, first)] + [((token + n) % 256, first - n) for n in range(1, wanted)]
    return TokenLogprob(first, tuple(others[:wanted]))


def _completion(events: Sequence[TokenEvent]) -> Completion:
    last = events[-1]
    kept = events if last.finish in (None, "length") else events[:-1]
    return Completion(
        tokens=tuple(event.token for event in kept),
        finish=last.finish or "length",
        receipt=last.receipt,
        logprobs=tuple(event.logprob for event in kept if event.logprob is not None),
        readouts=tuple(one for event in events for one in event.readouts),
    )


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def _normal(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_number(key)))
