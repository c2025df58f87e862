"""What the fake engine says of a request: words from a hash of the prompt and of the plan, and the
receipt, which the plan's own selections count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.engines.base import (
    Completion,
    GateReceipt,
    GenerationRequest,
    PointReceipt,
    RampReceipt,
    Receipt,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from steer.engines.fake.controls import FakeFailure
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.model import HookPoint
from steer.plan.selection import trace_of

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


def events_of(
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
            yield TokenEvent(token, logprob, "stop", receipt_of(request, generated))
            return
        if len(generated) == limit:
            yield TokenEvent(token, logprob, "length", receipt_of(request, generated))
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
    for place in range(6 + number(key) % 8):
        word = words[number(f"{key}{place}") % len(words)]
        yield from (" " * (place > 0) + word).encode()
    while True:
        yield ByteTokenizer.eos_token_id


def receipt_of(request: GenerationRequest, generated: Sequence[int]) -> Receipt | None:
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
    first = -(1 + number(f"{place}{token}") % 100) / 100
    others = [(token, first)] + [((token + n) % 256, first - n) for n in range(1, wanted)]
    return TokenLogprob(first, tuple(others[:wanted]))


def completion_of(events: Sequence[TokenEvent]) -> Completion:
    """The whole of a request that ended."""
    last = events[-1]
    kept = events if last.finish in (None, "length") else events[:-1]
    return Completion(
        tokens=tuple(event.token for event in kept),
        finish=last.finish or "length",
        receipt=last.receipt,
        logprobs=tuple(event.logprob for event in kept if event.logprob is not None),
        readouts=tuple(one for event in events for one in event.readouts),
    )


def number(text: str) -> int:
    """A number of 48 bits that depends on `text` alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def normal(key: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that depend on `key` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number(key)))
