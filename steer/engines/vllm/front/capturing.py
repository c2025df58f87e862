"""Captures on vLLM: what the workers are told to keep, and what is made of what they kept.

States travel from the workers as they are. Logits are made of the last layer's states by the
model's own head, in the workers; where only log-probabilities are wanted, only these travel back.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from steer.engines.base import Attention, Captured, CaptureRequest, QueriesKeys, TokenLogprob
from steer.engines.checks import check_captured, not_finite
from steer.engines.token_rows import no_token_rows
from steer.engines.vllm.front.drivers import Driver
from steer.engines.vllm.messages import pack, read_attention, read_logprobs, unpack
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import NotFinite, SpecError, SteerError, TooLarge, Unsupported
from steer.model import HookPoint, ModelInfo

MAX_CAPTURE_BYTES = 1 << 30
"""What the states of one prompt may take."""

_AT_ONCE = 1 << 27
"""What the states of several prompts may take, in bytes, to travel in one message."""


def capture_order(request: CaptureRequest, prompt: Sequence[int], info: ModelInfo) -> CaptureOrder:
    """What the workers keep of `prompt`. Raises `SteerError` for positions that it has not, and
    for more states than are allowed."""
    positions = _positions(request, len(prompt))
    attended = len(positions) if request.attention else 0
    points = dict.fromkeys(request.points)
    read = request.read_for_logits(len(prompt))
    if read:
        points[_last(info)] = None
        positions = (*positions, *(one for one in read if one not in set(positions)))
    layers = tuple(dict.fromkeys(request.attention))
    order = CaptureOrder(tuple(points), positions, layers, attended)
    size = _bytes(order, info) + _attention_bytes(order, len(prompt), info)
    if size > MAX_CAPTURE_BYTES:
        beside = f", and what {len(layers)} layers attend to," if layers else ""
        raise TooLarge(
            f"the states of {len(points)} hook points at {len(positions)} positions{beside} are "
            f"{size >> 20} MiB and {MAX_CAPTURE_BYTES >> 20} MiB are allowed: choose fewer "
            "positions or points" + (", or a shorter prompt" if layers else ""),
            param="/positions",
        )
    return order


def collect(
    driver: Driver, request: CaptureRequest, tickets: Sequence[Ticket], info: ModelInfo
) -> list[Captured]:
    """What was captured under each prompt's ticket. Raises `SteerError` (`NotFinite` where a
    prompt's numbers ran over)."""
    lengths = {
        ticket.key: len(prompt) for ticket, prompt in zip(tickets, request.prompts, strict=True)
    }
    kept, attended = [], []
    for group in _messages(tickets, lengths, info):
        for found, ticket in zip(_fetched(driver, group), group, strict=True):
            kept.append(_states(found, ticket, info))
            attended.append(_attention(found, _order(ticket), lengths[ticket.key], info))
    prompts = list(zip(kept, tickets, request.prompts, strict=True))
    logits = [
        unembed(driver, _read(request, *one, info), info) if request.logits != "none" else None
        for one in prompts
    ]
    logprobs = _logprobs(driver, request, prompts, info)
    results = []
    for (states, ticket, prompt), rows, said, attention in zip(
        prompts, logits, logprobs, attended, strict=True
    ):
        place = _places(ticket)
        wanted = [place[position] for position in _positions(request, len(prompt))]
        captured = Captured(
            {point: states[point][wanted] for point in request.points},
            None if rows is None else request.kept_logits(rows),
            said,
            attention,
        )
        check_captured(captured, steered=ticket.plan is not None)
        results.append(captured)
    return results


def unembed(driver: Driver, states: Tensor, info: ModelInfo) -> Tensor:
    """The logits `[..., vocab]` of states `[..., d_model]` after the last layer."""
    rows = states.reshape(-1, states.shape[-1])
    answers = driver.rpc("steer_unembed", pack(rows))
    data = next(answer for answer in chain(*answers) if answer is not None)
    return unpack(data, info.vocab_size).reshape(*states.shape[:-1], -1)


def project(driver: Driver, point: HookPoint, states: Tensor, info: ModelInfo) -> Tensor:
    """What the output projection behind `point` makes of `states`, see `Engine.project`."""
    rows = states.reshape(-1, states.shape[-1])
    found = told(chain(*driver.rpc("steer_project", point.layer, point.site, pack(rows))))
    return unpack(found[0]["made"], info.d_model).reshape(*states.shape[:-1], -1)


def queries_and_keys(driver: Driver, layer: int, states: Tensor) -> QueriesKeys:
    """See `Engine.queries_and_keys`; tensor-parallel workers have heads of their own. Data-parallel
    engines all say the same."""
    found = told(driver.rpc("steer_queries", layer, pack(states))[0])
    found.sort(key=lambda answer: int(answer["rank"]))

    def whole(name: str) -> Tensor:
        rows = [torch.frombuffer(bytearray(one[name]), dtype=torch.float32) for one in found]
        parts = zip(rows, found, strict=True)
        return torch.cat([row.view(len(states), one["heads"], -1) for row, one in parts], 1)

    return QueriesKeys(whole("queries"), whole("keys"))


def told(answers: Iterable[Mapping[str, Any] | None]) -> list[Mapping[str, Any]]:
    """What the workers that have the layer say. Raises `Unsupported` where one could not."""
    found = [answer for answer in answers if answer is not None]
    for answer in found:
        if "error" in answer:
            raise Unsupported(str(answer["error"]), code=str(answer["code"]))
    return found


def token_rows(driver: Driver, tokens: Sequence[int], info: ModelInfo) -> Tensor:
    """The rows of `tokens`, see `Engine.token_rows`; each is with one of the workers."""
    found: dict[int, bytes] = {}
    for answer in chain(*driver.rpc("steer_token_rows", list(tokens))):
        if "error" in answer:
            raise Unsupported(str(answer["error"]), code=str(answer["code"]))
        found |= {int(token): row for token, row in answer["rows"].items()}
    missing = [token for token in tokens if token not in found]
    if missing:
        raise no_token_rows(info.architecture, f"no worker has the row of the token {missing[0]}")
    return torch.cat([unpack(found[token], info.d_model) for token in tokens])


_Prompt = tuple[Mapping[HookPoint, Tensor], Ticket, Sequence[int]]
"""The states that were kept of a prompt, under which ticket, and its tokens."""


def _logprobs(
    driver: Driver, request: CaptureRequest, prompts: Sequence[_Prompt], info: ModelInfo
) -> list[tuple[TokenLogprob, ...]]:
    """The log-probabilities of every prompt, asked for in one message; empty where none are."""
    if request.logprobs is None:
        return [() for _ in prompts]
    # The last position predicts what comes after the prompt: nobody asked for that.
    rows = [_read(request, *one, info)[:-1] for one in prompts]
    tokens = [prompt[request.read_for_logits(len(prompt)).start + 1 :] for _, _, prompt in prompts]
    every = [token for said in tokens for token in said]
    if not every:
        return [() for _ in prompts]
    answers = driver.rpc("steer_logprobs", pack(torch.cat(rows)), every, request.logprobs)
    found = iter(read_logprobs(next(answer for answer in chain(*answers) if answer is not None)))
    return [tuple(next(found) for _ in said) for said in tokens]


def _read(
    request: CaptureRequest,
    states: Mapping[HookPoint, Tensor],
    ticket: Ticket,
    prompt: Sequence[int],
    info: ModelInfo,
) -> Tensor:
    """The last layer's states `[n, d_model]` at the positions whose logits are needed."""
    place = _places(ticket)
    return states[_last(info)][[place[one] for one in request.read_for_logits(len(prompt))]]


def _messages(
    tickets: Sequence[Ticket], lengths: Mapping[str, int], info: ModelInfo
) -> Iterator[list[Ticket]]:
    """The tickets in runs whose states travel together; `lengths` are those of the prompts, by
    key."""
    group: list[Ticket] = []
    size = 0
    for ticket in tickets:
        order = _order(ticket)
        more = _bytes(order, info) + _attention_bytes(order, lengths[ticket.key], info)
        if group and size + more > _AT_ONCE:
            yield group
            group, size = [], 0
        group.append(ticket)
        size += more
    if group:
        yield group


def _fetched(driver: Driver, tickets: Sequence[Ticket]) -> list[dict[str, bytes]]:
    """What the workers kept under each ticket, of all stages together; an engine that had no part
    in a prompt kept nothing of it."""
    workers = chain(*driver.rpc("steer_captured", [ticket.key for ticket in tickets]))
    return [dict(ChainMap(*found)) for found in zip(*workers, strict=True)]


def _states(found: Mapping[str, bytes], ticket: Ticket, info: ModelInfo) -> dict[HookPoint, Tensor]:
    """The states by hook point, rows in the order of the ticket's positions."""
    if NotFinite.code in found:
        raise not_finite("the states", steered=ticket.plan is not None)
    states = {
        point: unpack(found[str(point)], info.width(point.site)) for point in _order(ticket).points
    }
    for point, rows in states.items():
        if torch.isneginf(rows).all(-1).any():
            raise SteerError(f"no state passed {point} at some of the positions asked for")
    return states


def _places(ticket: Ticket) -> dict[int, int]:
    """The row of each position among a ticket's states."""
    return {position: row for row, position in enumerate(_order(ticket).positions)}


def _order(ticket: Ticket) -> CaptureOrder:
    if ticket.capture is None:
        raise AssertionError("the ticket of a capture has an order")
    return ticket.capture


def _bytes(order: CaptureOrder, info: ModelInfo) -> int:
    return 4 * len(order.positions) * sum(info.width(point.site) for point in order.points)


def _attention_bytes(order: CaptureOrder, tokens: int, info: ModelInfo) -> int:
    """What the weights and values of an order take, of a prompt of so many tokens."""
    heads, head_dim = info.n_heads or 1, info.head_dim or 1
    return 4 * len(order.attention) * heads * tokens * (order.attended + head_dim)


def _attention(
    found: Mapping[str, bytes], order: CaptureOrder, tokens: int, info: ModelInfo
) -> dict[int, Attention]:
    """What heads attend to, by layer."""
    if not order.attention:
        return {}
    return read_attention(found, order.attention, tokens, order.attended, info.head_dim or 1)


def _last(info: ModelInfo) -> HookPoint:
    return HookPoint(info.n_layers - 1, "resid_post")


def _positions(request: CaptureRequest, length: int) -> tuple[int, ...]:
    """The absolute positions in a prompt of `length` tokens whose states are asked for."""
    positions = request.positions
    if positions is None:
        return tuple(range(length)) if request.points or request.attention else ()
    for position in positions:
        if not -length <= position < length:
            raise SpecError(
                f"position {position} is outside a prompt of {length} tokens",
                code="position_out_of_range",
                param="/positions",
            )
    return tuple(position % length for position in positions)
