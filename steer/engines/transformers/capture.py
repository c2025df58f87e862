"""Reading activations of whole prompts, with or without steering, through the same hook points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from steer.batch.requests import SteeredRequest
from steer.engines.base import Attention, Captured, CaptureRequest, GenerationRequest
from steer.engines.checks import check_captured, check_roles
from steer.engines.transformers.prompts import run_prompts
from steer.engines.transformers.sequences import Batch
from steer.engines.transformers.structure.attention import (
    attention_modules,
    attention_read,
    check_attention,
)
from steer.errors import SpecError
from steer.model import HookPoint

_WORTH_SHARING = 3
"""Prompts with a common beginning that are worth a pass of their own: fewer fill no batch."""


def capture_batch(batch: Batch, request: CaptureRequest) -> list[Captured]:
    """The states of each prompt, in the order asked for.

    Prompts run in groups of like length, so that padding stays small, and of a common beginning
    where that is computed once; memory is bounded by one group's states and logits.
    """
    plans = request.plans or [None] * len(request.prompts)
    roles = request.roles or [None] * len(request.prompts)
    generations = [
        GenerationRequest("capture", tuple(prompt), plan=plan, roles=whose)
        for prompt, plan, whose in zip(request.prompts, plans, roles, strict=True)
    ]
    for one in generations:
        check_roles(one)
    found: dict[int, Captured] = {}
    alone = batch.chunk is None or bool(request.attention)
    for group in _groups(request, generations, 1 if alone else batch.rows):
        captured = _capture_group(batch, request, [generations[n] for n in group])
        found.update(zip(group, captured, strict=True))
    return [found[n] for n in range(len(request.prompts))]


def _groups(
    request: CaptureRequest, generations: Sequence[GenerationRequest], rows: int
) -> list[list[int]]:
    """The prompts by number, at most `rows` together."""
    order = sorted(range(len(request.prompts)), key=lambda n: len(request.prompts[n]))
    together: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for n in order:
        prompt, asked = tuple(request.prompts[n]), generations[n]
        start = len(prompt) if request.tail is None else max(len(prompt) - request.tail, 0)
        if request.tail is not None and not _steered_before(start, asked):
            together.setdefault((len(prompt), prompt[:start]), []).append(n)
        elif _below(request, asked) > 0:
            together.setdefault((len(prompt), prompt), []).append(n)
    groups = [group for group in together.values() if len(group) >= _WORTH_SHARING]
    alone = {n for group in groups for n in group}
    # Of one text, those run together that begin to differ at the same block.
    groups = [sorted(group, key=lambda n: _below(request, generations[n])) for group in groups]
    groups.append([n for n in order if n not in alone])
    return [group[first : first + rows] for group in groups for first in range(0, len(group), rows)]


def _capture_group(
    batch: Batch, request: CaptureRequest, generations: Sequence[GenerationRequest]
) -> list[Captured]:
    prompts = [one.prompt for one in generations]
    requests: list[SteeredRequest] = []
    # What heads attend to is read of a whole prompt in one pass.
    chunk = None if request.attention else batch.chunk
    # A pass ends with the last state that is read: heads have attended where theirs passes.
    behind = tuple(HookPoint(layer, "head_out") for layer in request.attention)
    try:
        for one in generations:
            requests.append(batch.take(one))
        with _attention(batch, request, prompts[0]) as attention:
            done = run_prompts(
                batch.hooked,
                batch.tables,
                batch.ledger,
                requests,
                prompts,
                points=tuple(dict.fromkeys((*request.points, *behind))),
                logits=request.logits,
                logprobs=request.logprobs,
                chunk=chunk,
                shared=0 if chunk is None else _shared(request, generations),
                alike=0 if chunk is None else _alike(request, generations),
                tail=request.tail,
            )
    finally:
        for taken in requests:
            batch.give_back(taken)
    width = max(map(len, prompts))
    results = []
    for row, prompt in enumerate(prompts):
        columns = _columns(request.positions, len(prompt), width)
        states = {p: done.states[p][row, columns].float().cpu().clone() for p in request.points}
        logits = None
        if done.logits is not None:
            kept = len(prompt) if request.tail is None else min(request.tail, len(prompt))
            logits = done.logits[row, -kept:].cpu().clone()
        scores = done.logprobs[row]
        if request.tail is not None:
            scores = scores[len(scores) - min(request.tail, len(scores)) :]
        captured = Captured(states, logits, tuple(scores), attention)
        check_captured(captured, steered=generations[row].plan is not None)
        results.append(captured)
    return results


@contextmanager
def _attention(
    batch: Batch, request: CaptureRequest, prompt: Sequence[int]
) -> Iterator[Mapping[int, Attention]]:
    """What is read of attention in the pass inside the `with` block, which is over `prompt` alone
    where anything is."""
    if not request.attention:
        yield {}
        return
    info = batch.hooked.info
    owners = attention_modules(batch.hooked.map.targets, request.attention, info)
    positions = request.positions
    if positions is not None:
        positions = tuple(_columns(positions, len(prompt), len(prompt)))
    with attention_read(owners, positions) as found:
        yield found
    check_attention(found, request.attention, info)


def _shared(request: CaptureRequest, generations: Sequence[GenerationRequest]) -> int:
    """How many first tokens are the same in all prompts, unsteered, and of no interest: such as
    those of a prompt into which one state after the other is put."""
    prompts = [one.prompt for one in generations]
    length = len(prompts[0])
    tail = request.tail
    everywhere = request.logits == "all" or request.logprobs is not None
    whole = request.points or (everywhere and tail is None)
    if whole or len(prompts) == 1 or any(len(prompt) != length for prompt in prompts):
        return 0
    # What is of interest is left, and the token before it, which predicts its first.
    alike = length - 1 if not everywhere or tail is None else max(length - tail - 1, 0)
    for asked in generations:
        pairs = zip(prompts[0][:alike], asked.prompt[:alike], strict=True)
        alike = next((n for n, (one, other) in enumerate(pairs) if one != other), alike)
        first = _first_needed(asked)
        alike = alike if first is None else min(alike, first)
    return alike


def _alike(request: CaptureRequest, generations: Sequence[GenerationRequest]) -> int:
    """How many first blocks compute the same for all prompts: for one text, those below whatever a
    plan reaches and the request reads."""
    if len({tuple(one.prompt) for one in generations}) > 1 or len(generations) < _WORTH_SHARING:
        return 0
    return min(_below(request, one) for one in generations)


def _below(request: CaptureRequest, asked: GenerationRequest) -> int:
    """The blocks below whatever a prompt's plan edits or reads and the request reads."""
    layers = [point.layer for point in request.points]
    if asked.plan is not None and asked.plan.lowest is not None:
        layers.append(asked.plan.lowest)
    return min(layers, default=0)


def _steered_before(start: int, asked: GenerationRequest) -> bool:
    first = _first_needed(asked)
    return first is not None and first < start


def _first_needed(asked: GenerationRequest) -> int | None:
    if asked.plan is None:
        return None
    return asked.plan.first_needed(asked.prompt, len(asked.prompt), asked.roles)


def _columns(positions: tuple[int, ...] | None, length: int, width: int) -> list[int]:
    """Columns of the padded batch for absolute (or negative) positions of one prompt."""
    padding = width - length
    if positions is None:
        return list(range(padding, width))
    for position in positions:
        if not -length <= position < length:
            raise SpecError(
                f"position {position} is outside a prompt of {length} tokens",
                code="position_out_of_range",
                param="/positions",
            )
    return [width + p if p < 0 else padding + p for p in positions]
