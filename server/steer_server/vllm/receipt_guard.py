"""vLLM's `generate`, watched: no steered answer passes without its receipt.

Every route of vLLM that generates ends in `EngineClient.generate`. Requests that carry nothing of
Steer's go through with nothing changed but the tokens that end an answer, which are those of the
model's files on any engine. A ticket is taken from this process's routes alone; a spec, which the
client of any route may send as `vllm_xargs: {"steering": "<JSON>"}`, is compiled here.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from steer.engines.base import Receipt, TokenReadout
from steer.engines.vllm.front.ranks import ask_engines
from steer.engines.vllm.messages import read_readouts, take_off
from steer.engines.vllm.ticket import EXTRA_ARG, Ticket
from steer.errors import NotFinite, SpecError, SteerError, Unsupported
from steer.readouts.watching import WatchPlan
from steer_server.generation.inspection.readouts import ReadoutFeed, check_amount
from steer_server.generation.steering import Steering
from steer_server.metrics import Metrics
from steer_server.vllm.fetching.arrived_readouts import ArrivedReadouts, Rows
from steer_server.vllm.fetching.readout_fetcher import ReadoutFetcher
from steer_server.vllm.fetching.receipt_fetcher import ReceiptFetcher
from steer_server.vllm.fetching.watched_outputs import WatchedOutputs
from steer_server.vllm.pending_receipts import Count, PendingReceipts, renewed, with_ticket

SPEC_ARG = "steering"
"""The entry of `vllm_xargs` that holds a spec, as JSON text."""

Outputs = AsyncGenerator[Any, None]
Compare = Callable[[str, int, tuple[int, ...], list[int]], Awaitable[list[TokenReadout]]]
"""From a ticket's key, a choice, its prompt and what it said to the divergences of its tokens from
the unsteered twin; raises `SteerError`."""
ReadText = Callable[[Any], Awaitable[tuple[Steering, Ticket]]]
"""From the JSON text of a spec to its plan and a ticket; raises `SteerError`."""


class ReceiptGuard:
    """Assumes: used from the event loop of vLLM's client.

    Guarantees: a request with a ticket or a spec ends with the receipts of all its choices, or
    with an error; what is kept for one goes with it; where detectors are armed on all requests,
    none is answered that they do not watch.
    """

    def __init__(
        self,
        client: Any,
        metrics: Metrics,
        read_text: ReadText,
        ends: frozenset[int] = frozenset(),
        tokenizer: Any = None,
        readout_values: int = 1 << 22,
        compare: Compare | None = None,
        width: int = 0,
        arrived: ArrivedReadouts | None = None,
        watches_all: bool = False,
    ) -> None:
        """Puts itself in the place of `client.generate`. `ends` are the tokens that end an answer
        by the model's files, beside those that vLLM knows. `tokenizer` writes the tokens of
        read-outs, of which one sequence may have so many values. `compare` runs the twin of a
        choice that asks for `kl`, for which `width` numbers of a token are kept. `arrived` are the
        read-outs that come with the engine's outputs; others are asked for. `watches_all`: the
        operator has armed detectors on every request, and what none of them watches is refused."""
        self._ends, self._tokenizer, self._readout_values = ends, tokenizer, readout_values
        self._generate: Callable[..., Outputs] = client.generate
        self._metrics, self._read_text = metrics, read_text
        self._compare, self._width = compare, width
        self._watches_all = watches_all
        self._calls = ReceiptFetcher(
            lambda asked: ask_engines(client, "steer_receipts", asked),
            client.reset_prefix_cache,
        )
        self._readouts = ReadoutFetcher(lambda asked: ask_engines(client, "steer_readouts", asked))
        self._arrived = ArrivedReadouts() if arrived is None else arrived
        self._pending: WeakValueDictionary[str, PendingReceipts] = WeakValueDictionary()
        """By the texts of their tickets: of one that was not made here nothing is read."""
        client.generate = self.generate

    def expect(
        self, ticket: Ticket, *, inspects: bool = False, watch: WatchPlan | None = None
    ) -> PendingReceipts:
        """The ticket is good for as long as somebody holds this; `inspects` is whether its prompts
        are to be read as well, `watch` what is read of its tokens, and detectors."""
        pending = PendingReceipts(ticket, inspects, watch=watch or WatchPlan())
        self._pending[pending.extra_args[EXTRA_ARG]] = pending
        return pending

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **named: Any) -> Outputs:
        """In the place of `EngineClient.generate`; refuses tickets that were not made here."""
        _end_with(sampling_params, self._ends)
        extra = sampling_params.extra_args
        if self._watches_all and (not extra or EXTRA_ARG not in extra):
            raise refusal(_unwatched())
        if not extra or (EXTRA_ARG not in extra and SPEC_ARG not in extra):
            return self._generate(prompt, sampling_params, request_id, **named)
        start = partial(self._generate, prompt, request_id=request_id, **named)
        if EXTRA_ARG not in extra:
            return self._ordered(start, sampling_params)
        pending = self._pending_of(extra)
        if pending.reads_tokens_alone and _is_more_than_tokens(prompt):
            return _refused(pending, _only_tokens_are_read())
        try:
            self._check_amount(pending, prompt, sampling_params)
        except SteerError as error:
            return _refused(pending, error)
        return self._watched(start, sampling_params, pending, pending.begin())

    def _check_amount(self, pending: PendingReceipts, prompt: Any, params: Any) -> None:
        """Raises `TooLarge` for more read-outs than one sequence may have."""
        if pending.watch.own is not None:
            ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
            ids = getattr(prompt, "prompt_token_ids", None) if ids is None else ids
            generated = 1 if params.max_tokens is None else params.max_tokens
            most, length = self._readout_values, len(ids or ())
            check_amount(most, pending.watch.own, length, generated, self._width)

    def _pending_of(self, extra: Mapping[str, Any]) -> PendingReceipts:
        text = extra[EXTRA_ARG]
        pending = self._pending.get(text) if isinstance(text, str) else None
        if pending is None or SPEC_ARG in extra:
            raise refusal(foreign_ticket())
        return pending

    async def _ordered(self, start: Callable[..., Outputs], params: Any) -> Outputs:
        """A request with a spec of its own."""
        try:
            steering, ticket = await self._read_text(params.extra_args[SPEC_ARG])
        except SteerError as error:
            raise refusal(error) from error
        pending = self.expect(ticket)
        params = with_ticket(params, pending.extra_args, without=SPEC_ARG)
        with self._metrics.request(None, steering.vectors, steering.strengths):
            outputs = self._watched(start, params, pending, pending.begin())
            async with aclosing(outputs):
                async for output in outputs:
                    yield output

    async def _watched(
        self, start: Callable[..., Outputs], params: Any, pending: PendingReceipts, number: int
    ) -> Outputs:
        params, ticket = _ticketed(params, pending, number)
        if pending.watch.stops and params.output_kind == RequestOutputKind.FINAL_ONLY:
            # What is to be ended must be seen before its end.
            params = params.clone()
            params.output_kind = RequestOutputKind.CUMULATIVE
        reads = ticket is not None and pending.readouts is not None
        steered = ticket is not None and ticket.plan is not None
        delta = params.output_kind == RequestOutputKind.DELTA
        run = _Run(
            number,
            ticket,
            Count(delta=delta, keep=reads),
            WatchedOutputs(pending.watch, self._tokenizer, params, delta=delta),
            _Clock(self._metrics) if steered else None,
        )
        reads = reads and pending.reads_passes
        if ticket is not None and ticket.brings_readouts:
            self._arrived.expect(ticket.key)
        fetched, read, compared = not steered, not reads, not pending.compares
        try:
            outputs = start(sampling_params=params)
            async with aclosing(outputs):
                async for output in outputs:
                    run.count.take(output)
                    pending.prompts[number] = run.count.prompt
                    if run.clock is not None and any(run.count.generated.values()):
                        run.clock.tick()
                    if reads and run.count.generated:
                        read = output.finished
                        shown = await self._read(pending, run, last=read)
                        if shown is not None:
                            await outputs.aclose()
                            run.stop(output, shown)
                            pending.stopped = True
                    if output.finished and not run.count.failed:
                        await self._end(pending, run, output)
                        fetched = compared = True
                    run.watched.passed(output)
                    yield output
        finally:
            if ticket is not None and not fetched:
                self._calls.drop(ticket.key)
            if ticket is not None:
                self._leave(ticket.key, fetched=read and compared)

    def _leave(self, key: str, *, fetched: bool) -> None:
        """What was read under a ticket's key is of no use any more."""
        self._arrived.forget(key)
        if not fetched:
            self._readouts.drop(key)

    async def _end(self, pending: PendingReceipts, run: _Run, output: Any) -> None:
        """The last `output` is there: fetches the receipts, and says what detectors found."""
        receipts: list[Receipt] = []
        ticket = run.ticket
        if ticket is not None and ticket.plan is not None:
            receipts = await self._receipts(ticket.key, output, run.count.fed, pending)
        if ticket is not None and pending.compares:
            await self._divergences(pending, run, ticket)
        pending.close(run.number, receipts)
        if ticket is not None:
            first = run.number * ticket.n
            pending.detections += run.watched.told(self._metrics, first, ticket.key)
        self._finished(receipts, run.clock, max(run.count.generated.values()))

    async def _read(self, pending: PendingReceipts, run: _Run, *, last: bool) -> int | None:
        """Takes what was read since the output before, for the answer to carry and for the
        detectors; how many tokens are shown where one of these ends the answer."""
        plan, ticket, count = pending.readouts, run.ticket, run.count
        assert plan is not None, "something is read"
        assert ticket is not None, "and a ticket says so"
        try:
            found = await self._rows(ticket, count.fed, plan.width, last=last)
        except SteerError as error:
            pending.refused = error
            raise refusal(error) from error
        ends = None
        for choice, rows in found.items():
            shown = run.watched.see(choice, len(count.prompt), rows)
            feed = self._feed(pending, run, ticket, choice)
            pending.unsent += feed.entries(
                [
                    TokenReadout(at, count.token(choice, at), numbers)
                    for at, numbers in rows
                    if shown is None or at < len(count.prompt) + shown
                ]
            )
            ends = shown if ends is None else ends
        return ends

    async def _rows(
        self, ticket: Ticket, fed: dict[int, int], width: int, *, last: bool
    ) -> dict[int, Rows]:
        """By choice the rows of its tokens among those `fed`, each once. Raises `EngineError`."""
        if ticket.brings_readouts:
            arrived = self._arrived.take(ticket.key, fed[0], width)
            if arrived is not None:
                return {0: arrived}
        found = await self._readouts.fetch(ticket.key, fed, last=last)
        return {choice: read_readouts(found.get(choice, ()), width) for choice in sorted(fed)}

    async def _divergences(self, pending: PendingReceipts, run: _Run, ticket: Ticket) -> None:
        """Runs the twins of all choices, whose divergences go with the last output."""
        assert self._compare is not None, "offered where there is a way to"
        said, prompt = run.count.tokens, run.count.prompt
        choices = [choice for choice in sorted(said) if said[choice]]
        calls = [self._compare(ticket.key, n, prompt, said[n]) for n in choices]
        try:
            found = await asyncio.gather(*calls)
        except SteerError as error:
            pending.refused = error
            raise refusal(error) from error
        for choice, rows in zip(choices, found, strict=True):
            pending.unsent += self._feed(pending, run, ticket, choice).entries(rows)

    def _feed(
        self, pending: PendingReceipts, run: _Run, ticket: Ticket, choice: int
    ) -> ReadoutFeed:
        """What writes the entries of one choice."""
        place, length = run.number * ticket.n + choice, len(run.count.prompt)
        own, silent = pending.watch.own, pending.silent
        return ReadoutFeed(self._metrics, self._tokenizer, own, length, place, silent=silent)

    async def _receipts(
        self, key: str, output: Any, fed: dict[int, int], pending: PendingReceipts
    ) -> list[Receipt]:
        """The receipts that came with the last output; otherwise those that are asked for."""
        attached = take_off(output)
        try:
            if attached is not None and fed == {0: attached[0]}:
                return await self._calls.received(attached[1])
            return await self._calls.fetch(key, fed)
        except NotFinite as error:
            pending.refused = error
            raise refusal(error) from error

    def _finished(self, receipts: list[Any], clock: _Clock | None, generated: int) -> None:
        for receipt in receipts:
            self._metrics.receipt(receipt)
        if clock is not None:
            clock.stop(generated)


def _ticketed(params: Any, pending: PendingReceipts, number: int) -> tuple[Any, Ticket | None]:
    """The parameters of the engine's request `number`, and the ticket that they carry: a key of its
    own for each."""
    if pending.ticket.plan is None and pending.readouts is None:
        return with_ticket(params, None), None
    if number == 0 and params.n == pending.ticket.n:
        return params, pending.ticket
    ticket = renewed(pending.ticket, uuid.uuid4().hex, params.n)
    return with_ticket(params, ticket.as_extra_args()), ticket


def _end_with(params: Any, ends: frozenset[int]) -> None:
    """Adds `ends` to the tokens that end this request, unless it ignores them."""
    missing = ends.difference(params.stop_token_ids or ())
    if missing and not params.ignore_eos:
        params.stop_token_ids = [*(params.stop_token_ids or ()), *sorted(missing)]
        # What `min_tokens` keeps away for a while; vLLM gathers it when it makes the parameters.
        params.all_stop_token_ids.update(missing)


@dataclass(frozen=True)
class _Run:
    """One of the engine's requests, number `number` of its answer."""

    number: int
    ticket: Ticket | None
    count: Count
    watched: WatchedOutputs
    clock: _Clock | None

    def stop(self, output: Any, shown: int) -> None:
        """Ends it with `output`, of whose choice so many tokens are shown, and were said."""
        self.watched.cut(output, self.count.tokens[0], shown)
        # The token behind them was chosen, never fed and is not shown.
        self.count.generated[0] = shown + 1
        del self.count.tokens[0][shown:]


class _Clock:
    """Times one steered request; vLLM's own metrics time all of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._first: float | None = None

    def tick(self) -> None:
        """There are tokens."""
        if self._first is None:
            self._first = time.perf_counter()
            self._metrics.first_token.labels("true").observe(self._first - self._started)

    def stop(self, generated: int) -> None:
        """The longest of its sequences had this many tokens."""
        if self._first is not None and generated > 1:
            seconds = time.perf_counter() - self._first
            self._metrics.output_token.labels("true").observe(seconds / (generated - 1))


async def _refused(pending: PendingReceipts, error: SteerError) -> Outputs:
    """No outputs, and the reason, when vLLM's route asks for the first."""
    pending.refused = error
    raise refusal(error)
    yield


def _is_more_than_tokens(prompt: Any) -> bool:
    """Whether vLLM's input holds images, sound or video: then its tokens are not all of it."""
    if isinstance(prompt, Mapping):
        return prompt.get("type") == "multimodal" or bool(prompt.get("multi_modal_data"))
    return bool(getattr(prompt, "mm_features", None))


def _only_tokens_are_read() -> Unsupported:
    return Unsupported(
        "'inspect' reads the tokens of a prompt alone, and this one holds images, sound or video: "
        "leave 'inspect' out, or ask with text",
        param="/inspect",
        code="unsupported_parameter",
    )


def _unwatched() -> Unsupported:
    """For a request of a route that arms no detectors, where the operator has armed some on all."""
    return Unsupported(
        "detectors are armed on every request of this server, and watch the answers of "
        "/v1/chat/completions, /v1/completions and /v1/responses alone: ask there",
        code="unsupported",
    )


def foreign_ticket() -> SpecError:
    """For a ticket that no route of this process made."""
    return SpecError(
        f"'vllm_xargs' has an entry {EXTRA_ARG!r}, which only the server itself writes: send the "
        f"spec in the field 'steering', or as JSON text in 'vllm_xargs' under {SPEC_ARG!r}",
        param=f"/vllm_xargs/{EXTRA_ARG}",
        code="invalid_ticket",
    )


def refusal(error: SteerError) -> Exception:
    """The error as vLLM's own routes know it: what the client did wrong is answered with 400."""
    if error.status >= 500:
        return error
    known: Exception = VLLMValidationError(error.message, parameter=error.param or SPEC_ARG)
    return known
