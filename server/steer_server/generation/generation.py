"""Runs the sequences of one request and gives their text, piece by piece or whole."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import cast

from steer.engines.base import (
    FinishReason,
    GenerationRequest,
    Receipt,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from steer.errors import SteerError, TooLarge, Unsupported, pointer
from steer.prompts.roles import RoleRanges
from steer.readouts.answer import Entry
from steer.readouts.watching import WatchPlan
from steer_server.generation.inspection.detectors import planned_watch, told, watched_rows
from steer_server.generation.inspection.readouts import ReadoutFeed, check_amount, planned_readouts
from steer_server.generation.request_models import SamplingFields
from steer_server.generation.steering import Steering, resolve, whose_words
from steer_server.generation.text import TextRules, TextStream
from steer_server.http.request_id import request_id
from steer_server.state import Serving

log = logging.getLogger("steer.server")

Logprobs = tuple[tuple[int, TokenLogprob], ...]
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One HTTP request made ready: its sequences, one for each choice, admitted by the engine.

    `default` holds the same sequences unsteered, for `"compare": true`.
    """

    id: str
    model: str
    created: int
    started: float
    steering: Steering
    prompts: tuple[Prompt, ...]
    sequences: tuple[GenerationRequest, ...]
    default: tuple[GenerationRequest, ...] = ()
    text: TextRules = field(default_factory=TextRules)
    watch: WatchPlan = field(default_factory=WatchPlan)
    """What is read of its sequences, and the detectors that watch them."""
    silent: bool = False
    """`"max_tokens": 0`: the one token that a sequence needs for its receipt is kept back."""


@dataclass(frozen=True)
class Piece:
    """New text of choice `index`, the tokens it took, and at the end how the sequence ended."""

    index: int
    text: str = ""
    tokens: int = 1
    logprobs: Logprobs = ()
    finish: FinishReason | None = None
    receipt: Receipt | None = None
    readouts: tuple[Entry, ...] = ()
    detections: tuple[Entry, ...] = ()


@dataclass
class Answer:
    """A whole sequence: the sum of its pieces."""

    index: int
    request: GenerationRequest
    text: str = ""
    tokens: int = 0
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    finish: FinishReason = "stop"
    receipt: Receipt | None = None
    readouts: list[Entry] = field(default_factory=list)
    detections: tuple[Entry, ...] = ()

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs.extend(piece.logprobs)
        self.readouts.extend(piece.readouts)
        if piece.finish is not None:
            self.finish, self.receipt = piece.finish, piece.receipt
            self.detections = piece.detections


def prepare(
    serving: Serving,
    body: SamplingFields,
    prompts: Sequence[Prompt],
    *,
    prefix: str,
    at: str,
    roles: Callable[[], RoleRanges] | None = None,
) -> Generation:
    """Plans the steering and has every sequence admitted. Runs in a worker thread.

    `roles` finds whose words the tokens of a prompt are that was given as messages. Raises what is
    wrong with the request; `at` is the pointer of the prompt in it.
    """
    started = time.perf_counter()
    check_choices(serving, body, len(prompts))
    steering = resolve(serving, body.model, body.steering)
    if body.compare and steering.plan is None:
        raise Unsupported(
            "'compare' needs something to compare with: add 'steering', or use a profile as model",
            param="/compare",
            code="nothing_to_compare",
        )
    readouts = planned_readouts(serving, body.readouts, steering.plan)
    watch = planned_watch(serving, readouts, steering, body.detectors, compare=body.compare)
    _check_sampling(serving, body)
    whose = whose_words(steering, roles)
    name = prefix + uuid.uuid4().hex
    sequences, most = [], serving.settings.readout_values
    for place, prompt in enumerate(prompts):
        sampling = _sampling(serving, body, prompt, at)
        check_amount(most, readouts, len(prompt), sampling.max_tokens)
        for choice in range(body.choices):
            seed = None if sampling.seed is None else _wrapped(sampling.seed + choice)
            sequences.append(
                GenerationRequest(
                    id=f"{name}-{place * body.choices + choice}",
                    prompt=prompt,
                    sampling=replace(sampling, seed=seed),
                    plan=steering.plan,
                    measure=steering.plan is not None
                    and (body.receipt == "full" or serving.settings.measures(name)),
                    roles=whose,
                    readouts=watch.readouts,
                )
            )
    default = [
        replace(one, id=f"{one.id}-default", plan=None, measure=False, readouts=None)
        for one in (sequences if body.compare else ())
    ]
    for one in (*sequences, *default):
        try:
            serving.engine.admit(one)
        except SteerError as error:
            if error.code == "invalid_schema":
                error.at(body.format_at)
            raise
    fingerprint = steering.plan.fingerprint if steering.plan else None
    log.info(
        "request %s (%s): %d sequences, steering %s",
        name,
        request_id(),
        len(sequences),
        fingerprint,
    )
    return Generation(
        id=name,
        model=body.model,
        created=int(time.time()),
        started=started,
        steering=steering,
        prompts=tuple(prompts),
        sequences=tuple(sequences),
        default=tuple(default),
        text=body.text_rules,
        watch=watch,
        silent=body.limit == 0,
    )


def check_choices(serving: Serving, body: SamplingFields, prompts: int) -> None:
    """Raises `TooLarge` for more sequences than one request may have."""
    if body.choices * prompts > serving.settings.max_choices:
        raise TooLarge(
            f"{body.choices} choices for {prompts} prompts are more than the "
            f"{serving.settings.max_choices} sequences a request may have: lower 'n'",
            param="/n",
            code="too_many_choices",
        )


async def pieces(
    serving: Serving, run: Generation, sequences: Sequence[GenerationRequest]
) -> AsyncGenerator[Piece, None]:
    """The pieces of all the sequences as they come. Closing it cancels them all."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def follow(index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(_sequence(serving, run, index, request)) as events:
                async for piece in events:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(follow(n, one)) for n, one in enumerate(sequences)]
    try:
        open_sequences = len(tasks)
        while open_sequences:
            item = await queue.get()
            if item is None:
                open_sequences -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answers(serving: Serving, run: Generation) -> tuple[list[Answer], list[Answer]]:
    """The choices, and the unsteered ones where asked for; all in one batch of the engine."""
    together = (*run.sequences, *run.default)
    found = [Answer(index, request) for index, request in enumerate(together)]
    with serving.metrics.request(
        run.steering.profile, run.steering.vectors, run.steering.strengths
    ):
        async with aclosing(pieces(serving, run, together)) as stream:
            async for piece in stream:
                found[piece.index].add(piece)
    steered, default = found[: len(run.sequences)], found[len(run.sequences) :]
    for place, answer in enumerate(default):
        answer.index = place
    return steered, default


async def _sequence(
    serving: Serving, run: Generation, index: int, request: GenerationRequest
) -> AsyncGenerator[Piece, None]:
    """The pieces of one sequence."""
    text = TextStream(serving.engine.tokenizer, run.text)
    engine, length = serving.engine, len(request.prompt)
    own = None if request.readouts is None else run.watch.own
    feed = ReadoutFeed(serving.metrics, engine.tokenizer, own, length, index)
    matches = bool(run.text.stops)
    if matches:
        request = replace(request, stop=text.watch)
    watch = None if request.readouts is None else run.watch.watch(length)
    if watch is not None:
        see = watch.see
        request = replace(request, halt=lambda found: see(watched_rows(found)))
    steered = "true" if request.plan is not None else "false"
    first = last = run.started
    count = shown = 0
    # The protocol promises that closing the iterator cancels the request.
    events = cast("AsyncGenerator[TokenEvent, None]", serving.engine.generate(request))
    async with aclosing(events):
        async for event in events:
            last = time.perf_counter()
            count += 1
            if count == 1:
                first = last
                serving.metrics.first_token.labels(steered).observe(first - run.started)
            if run.silent:
                withheld = event.finish == "content_filter"
                finish: FinishReason = "content_filter" if withheld else "length"
                piece = Piece(index, tokens=0, finish=finish, receipt=event.receipt)
            else:
                piece = _piece(index, event, text, matches=matches)
            shown += piece.tokens
            if event.readouts:
                # A token that is kept back is in no entry either: its `kl` would name it.
                told_of = [one for one in event.readouts if one.position < length + shown]
                piece = replace(piece, readouts=feed.entries(told_of))
            if watch is not None and event.finish is not None:
                found = told(serving.metrics, watch, index, run.id)
                piece = replace(piece, detections=found)
            yield piece
            if event.finish is not None:
                _observe(serving, event, steered, (last - first, count - 1))


def _piece(index: int, event: TokenEvent, text: TextStream, *, matches: bool) -> Piece:
    if event.finish == "content_filter":
        # Neither its text nor its log-probability is shown; what was held back before it is.
        return Piece(index, text.finish(), 0, (), event.finish, event.receipt)
    # A token that ends the sequence is text where stops are kept; one that completed a stop string
    # has been seen.
    ended = event.finish == "stop" and not text.stopped
    if ended:
        new = text.push(event.token) if text.rules.keep_stop else ""
    else:
        new = text.taken() if matches else text.push(event.token)
    if event.finish is not None:
        new += text.finish()
    logprobs: Logprobs = ()
    if event.logprob is not None and (not ended or text.rules.keep_stop):
        logprobs = ((event.token, event.logprob),)
    return Piece(index, new, 1, logprobs, event.finish, event.receipt)


def _observe(serving: Serving, event: TokenEvent, steered: str, between: tuple[float, int]) -> None:
    seconds, steps = between
    if steps:
        serving.metrics.output_token.labels(steered).observe(seconds / steps)
    if event.receipt is not None:
        serving.metrics.receipt(event.receipt)


def _sampling(serving: Serving, body: SamplingFields, prompt: Prompt, at: str) -> SamplingParams:
    info = serving.engine.info
    room = info.max_length - len(prompt)
    if not prompt:
        raise SteerError("the prompt is empty", param=at, code="empty_prompt")
    if room < 1:
        raise SteerError(
            f"the prompt has {len(prompt)} tokens; {serving.model_name!r} reads at most "
            f"{info.max_length - 1} and one is left for the answer: shorten it",
            param=at,
            code="context_length_exceeded",
        )
    _check_tokens(serving, prompt, at)
    # With a limit of 0 one token is generated and kept back: it takes a step to get a receipt.
    limit = room if body.limit is None else min(max(body.limit, 1), room)
    return SamplingParams(
        max_tokens=limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        logprobs=body.alternatives,
        ignore_eos=body.ignore_eos,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        min_tokens=min(body.min_tokens, limit),
        stop_token_ids=frozenset(body.stop_token_ids),
        json_schema=body.schema_text,
    )


def _check_tokens(serving: Serving, tokens: Sequence[int], at: str) -> None:
    known = serving.engine.info.vocab_size
    if outside := [token for token in tokens if token >= known]:
        raise SteerError(
            f"{outside[0]} is not a token of {serving.model_name!r}: its vocabulary has {known}",
            param=at,
            code="unknown_token",
        )


_REMEDIES = {
    "response_format": ", or start the transformers engine with llguidance installed "
    "(pip install 'steer-llm[json]') and a fast tokenizer"
}


def _check_sampling(serving: Serving, body: SamplingFields) -> None:
    """Refuses what the engine cannot do, where it is asked for."""
    able = serving.engine.capabilities.sampling
    asked = {
        "temperature": body.temperature is not None,
        "top_p": body.top_p not in (None, 1.0),
        "top_k": body.top_k is not None,
        "min_p": body.min_p != 0,
        "seed": body.seed is not None,
        "logprobs": body.alternatives is not None,
        "presence_penalty": body.presence_penalty != 0,
        "frequency_penalty": body.frequency_penalty != 0,
        "repetition_penalty": body.repetition_penalty != 1,
        "logit_bias": bool(body.logit_bias),
        "min_tokens": body.min_tokens > 0,
        "stop_token_ids": bool(body.stop_token_ids),
        "ignore_eos": body.ignore_eos,
        "response_format": body.schema_text is not None,
    }
    for name, wanted in asked.items():
        if wanted and name not in able:
            at = body.format_at if name == "response_format" else pointer(name)
            raise Unsupported(
                f"this engine does not support {name!r}: leave it out{_REMEDIES.get(name, '')}",
                param=at,
                code="unsupported_parameter",
            )


def _wrapped(seed: int) -> int:
    """`seed` as a signed 64-bit number."""
    return (seed + 2**63) % 2**64 - 2**63
