"""What both forms of the running batch share: sequences, their steered, their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from steer.batch.ledger import Ledger
from steer.batch.requests import SteeredRequest
from steer.batch.tables import Tables
from steer.engines.base import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    TokenReadout,
)
from steer.engines.checks import not_finite
from steer.engines.listeners import Item
from steer.engines.readouts import ReadoutJoin
from steer.engines.receipts import make_receipt
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.room import CacheRoom
from steer.engines.transformers.sampling import NO_TOKEN, Sampler, choose, logprobs
from steer.errors import EngineError, SteerError
from steer.plan.selection import FOREVER, trace_of
from steer.readouts.measures import kl_divergence
from steer.readouts.readers import Instruments
from steer.readouts.readings import Readings, ReadSpan, RequestReadouts


@dataclass
class BatchSequence:
    """A request that runs, and what it has produced so far."""

    request: GenerationRequest
    steered: SteeredRequest
    sampler: Sampler
    limit: int
    tokens: list[int] = field(default_factory=list)
    reads: RequestReadouts | None = None
    """What is read of it in a pass, where it asks."""
    twin: BatchSequence | None = None
    """The same tokens without its plan, beside it in every pass, where it asks how much its
    steering changes (`kl`)."""
    leads: bool = True
    """Whether its tokens are chosen; a twin's are those of whom it follows."""
    readouts: ReadoutJoin | None = None
    """What was read and is not handed out yet."""

    def __post_init__(self) -> None:
        if self.reads is not None:
            self.readouts = ReadoutJoin(self.reads)

    def followed(self, steered: SteeredRequest) -> BatchSequence:
        """Gives it its twin, which runs as `steered`."""
        request = replace(
            self.request, plan=None, measure=False, readouts=None, stop=None, halt=None
        )
        self.twin = BatchSequence(
            request, steered, self.sampler, self.limit, self.tokens, leads=False
        )
        return self.twin

    @property
    def fed(self) -> int:
        """Tokens the model has computed: the last one generated is never fed back."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def longest(self) -> int:
        """How many tokens it may come to, prompt and generated tokens together."""
        return len(self.request.prompt) + self.limit

    @property
    def together(self) -> list[BatchSequence]:
        """Itself, and its twin where it has one."""
        return [self] if self.twin is None else [self, self.twin]

    def read(self, *, last: bool) -> tuple[TokenReadout, ...]:
        """What was read of the tokens fed since it was last asked; `last`: nobody asks again."""
        if self.readouts is None:
            return ()
        return tuple(self.readouts.take(self._token, self.fed, last=last))

    def _token(self, position: int) -> int:
        prompt = self.request.prompt
        return prompt[position] if position < len(prompt) else self.tokens[position - len(prompt)]

    @property
    def fixed_for(self) -> int:
        """For how many tokens to come their slots are those of the next one."""
        plan = self.steered.plan
        if plan is None or not plan.rules:
            return FOREVER
        return 0 if plan.gated else self.steered.fixed_until(self.fed) - self.fed


class Batch(Protocol):
    """A running batch, as the scheduler and captures use it.

    Assumes: one thread.
    Guarantees: a sequence's tokens do not depend on its neighbours, nor does its life: what is
    wrong with one is handed out as its error; slots and ledger rows are given back when it leaves,
    for whatever reason.
    """

    hooked: HookedModel
    tables: Tables
    ledger: Ledger
    instruments: Instruments
    """What its requests' read-outs are made with."""
    pairs: bool
    """Whether two sequences that join together are in every pass together."""
    sequences: list[BatchSequence]
    rows: int
    eos: frozenset[int]
    """The model's own end tokens."""
    max_length: int
    """The longest sequence, prompt and generated tokens together, that can run here."""
    causal: bool
    """Whether no token of a prompt sees those after it."""
    chunk: int | None
    """Columns of one pass over padded prompts; None: each prompt is computed alone and whole."""

    room: CacheRoom
    """How many tokens its caches may hold."""

    @property
    def free(self) -> int:
        """Places left for new sequences."""

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether sequences that may come to `lengths` have room beside those that run."""

    def take(self, request: GenerationRequest) -> SteeredRequest:
        """Takes a slot and a ledger row; raises `CapacityError` when all slots are in use."""

    def give_back(self, steered: SteeredRequest) -> None:
        """Gives back what `take` took."""

    def join(self, newcomers: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        """Takes sequences in; the tokens that this already gave. Ended sequences have left."""

    def decode(self) -> list[tuple[BatchSequence, Item]]:
        """One forward pass; the tokens that it gave. Ended sequences have left."""

    def leave(self, sequence: BatchSequence) -> None:
        """Takes a sequence out of the batch."""

    def clear(self) -> list[BatchSequence]:
        """Takes every sequence out, after a failure; returns them."""

    def lend(self) -> None:
        """Called before other code runs the model, between two passes."""

    def prove(self) -> None:
        """The start-up proof: raises `Unsupported` where steering would not be exact here."""


class RequestRows:
    """What every form of `Batch` has: places for `rows` sequences, and for as many captures beside
    a full batch, each with a slot and a ledger row."""

    pairs = True

    def __init__(
        self,
        hooked: HookedModel,
        tables: Tables,
        *,
        rows: int,
        eos: frozenset[int],
        room: CacheRoom = CacheRoom(),  # noqa: B008 - frozen
    ) -> None:
        self.hooked, self.tables, self.rows, self.eos, self.room = hooked, tables, rows, eos, room
        self.sequences: list[BatchSequence] = []
        self.ledger = Ledger(2 * rows, tables.device)
        self.instruments = Instruments(
            hooked.device, self._unembed, vocab_size=hooked.info.vocab_size
        )
        self._free_rows = list(range(2 * rows - 1, -1, -1))

    @property
    def free(self) -> int:
        """Places left for new sequences."""
        return self.rows - len(self.sequences)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether sequences that may come to `lengths` have room beside those that run: each takes
        what it holds."""
        return self.room.apart([*(s.longest for s in self.sequences), *lengths])

    def take(self, request: GenerationRequest) -> SteeredRequest:
        """Takes a slot and a ledger row; raises `CapacityError` when all slots are in use."""
        plan, trace = request.plan, None
        if plan is not None:
            trace = trace_of(plan.selections, request.prompt, request.roles)
        slot = 0 if plan is None else self.tables.acquire(plan)
        row = self._free_rows.pop()
        self.ledger.reset(row)
        return SteeredRequest(row, len(request.prompt), plan, slot, request.measure, trace)

    def readings(self, spans: Sequence[ReadSpan]) -> Readings | None:
        """What a pass over `spans` reads; None where nothing is asked for."""
        return Readings.of(spans, self.instruments) if spans else None

    def lend(self) -> None:
        """Nothing to do: the model is left as it is."""

    def _unembed(self, states: Tensor) -> Tensor:
        self.lend()
        return self.hooked.unembed(states)

    def give_back(self, steered: SteeredRequest) -> None:
        """Gives back what `take` took."""
        if steered.plan is not None:
            self.tables.release(steered.plan)
        self._free_rows.append(steered.row)


def take_tokens(
    sequences: Sequence[BatchSequence], logits: Tensor, ledger: Ledger, eos: frozenset[int]
) -> list[tuple[BatchSequence, Item]]:
    """Each sequence's next token, chosen from its row of float32 logits `[n, vocab]`, or the error
    that it ends with, of which its neighbours hear nothing.

    The event of a sequence that ends here carries the reason and the receipt. Twins are given the
    tokens of those whom they follow, and are handed out to nobody.
    """
    if any(s.twin is not None for s in sequences):
        sequences, logits = _compared(sequences, logits)
    samplers = [s.sampler for s in sequences]
    chosen = choose(logits, samplers, [s.tokens for s in sequences])
    tokens = [one if isinstance(one, int) else NO_TOKEN for one in chosen]
    items: list[Item] = []
    for sequence, one, logprob in zip(
        sequences, chosen, logprobs(logits, tokens, samplers), strict=True
    ):
        try:
            if isinstance(one, Exception):
                raise one
            items.append(_taken(sequence, one, logprob, ledger, eos))
        except Exception as error:
            items.append(failure_of(error))
    return list(zip(sequences, items, strict=True))


def _compared(
    sequences: Sequence[BatchSequence], logits: Tensor
) -> tuple[list[BatchSequence], Tensor]:
    """Those whose tokens are chosen, and their rows; notes how far these are from their twins'."""
    row_of = {id(s): row for row, s in enumerate(sequences)}
    pairs = [(s, s.twin) for s in sequences if s.twin is not None]
    mine, theirs = ([row_of[id(s)] for s in side] for side in zip(*pairs, strict=True))
    apart = kl_divergence(logits[mine], logits[theirs]).tolist()
    for (sequence, _), kl in zip(pairs, apart, strict=True):
        if sequence.readouts is not None:
            sequence.readouts.chosen(sequence.fed + 1, kl)
    leading = [row for row, s in enumerate(sequences) if s.leads]
    return [sequences[row] for row in leading], logits[leading]


def _taken(
    sequence: BatchSequence,
    token: int,
    logprob: TokenLogprob | None,
    ledger: Ledger,
    eos: frozenset[int],
) -> TokenEvent:
    plan = sequence.steered.plan
    if token == NO_TOKEN:
        raise not_finite("the model's logits", steered=plan is not None)
    sequence.tokens.append(token)
    finish: FinishReason | None = None
    reads = sequence.read(last=False)
    if sequence.request.halt is not None and sequence.request.halt(reads):
        finish = "content_filter"
    elif _ends(sequence.request, token, eos):
        finish = "stop"
    elif len(sequence.tokens) >= sequence.limit:
        finish = "length"
    receipt = None
    if finish and plan is not None:
        receipt = make_receipt(sequence.steered, ledger, sequence.fed)
    if finish is not None:
        reads += sequence.read(last=True)
    return TokenEvent(token, logprob, finish, receipt, reads)


def _ends(request: GenerationRequest, token: int, eos: frozenset[int]) -> bool:
    if token in ends_of(request.sampling, eos):
        return True
    return request.stop is not None and request.stop(token)


def is_last(item: Item) -> bool:
    """Whether its sequence ends with `item`."""
    return isinstance(item, SteerError) or item.finish is not None


def failure_of(error: Exception) -> SteerError:
    """`error` as what one request ends with."""
    # A new one for each request: an exception that is raised in two threads mixes their traces.
    if isinstance(error, EngineError):
        return EngineError(error.message, param=error.param, code=error.code)
    if isinstance(error, SteerError):
        return error
    return EngineError(f"the engine failed: {type(error).__name__}: {error}")


def ends_of(sampling: SamplingParams, eos: frozenset[int]) -> frozenset[int]:
    """The ids that end a sequence of one request, where `eos` are the model's own."""
    own = frozenset() if sampling.ignore_eos else eos
    return own | sampling.stop_token_ids if sampling.stop_token_ids else own
