"""A forward pass made ready, and carried on while the same requests decode.

Between the arrivals and departures of requests a step differs from the one before in the positions
and, where a plan looks at token ids, in the slots of some tokens. So a pass is built once and then
carried on: what a carried step costs does not grow with what its requests ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from steer.batch.gates import Decisions
from steer.batch.ledger import PositionLedger
from steer.batch.requests import Ints
from steer.engines.vllm.inside.layers import AttendedRows
from steer.engines.vllm.taps.shifts import Shifts
from steer.engines.vllm.worker.requests import WorkerRequest
from steer.errors import Unsupported
from steer.plan.selection import FOREVER
from steer.readouts.readings import Readings


@dataclass(frozen=True)
class BatchTokens:
    """The tokens of one forward pass: request i computes `counts[i]` tokens, the first of them at
    position `starts[i]`. Requests lie behind one another in this order. `read` gives all tokens
    `[T]`, and is called only where a plan reads some, once, before the pass: they may be on a
    device. The last `drafts[i]` of a request's tokens were drafted, and may not stay; None where
    none was."""

    req_ids: Sequence[str]
    starts: Ints
    counts: Ints
    read: Callable[[], Ints]
    drafts: Ints | None = None

    @cached_property
    def offsets(self) -> Ints:
        """Where each request begins in the batch."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def tokens(self) -> Ints:
        """The tokens of all requests."""
        return self.read()

    def tokens_of(self, index: int, known: bool) -> Ints:
        """The tokens of a request; −1 for each where nobody has to know them."""
        count = int(self.counts[index])
        if not known:
            return np.full(count, -1, dtype=np.int64)
        start = int(self.offsets[index])
        return self.tokens[start : start + count]


def refuse_split_batches(vllm_config: Any) -> None:
    """Raises `Unsupported` where the model is called with parts of a step's batch: its taps count a
    pass's tokens from the batch's first, and a part would get the edits of another."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    splits = {
        "micro-batching (enable_dbo, ubatch_size)": parallel.use_ubatching,
        "prefill context parallelism (prefill_context_parallel_size)": (
            parallel.prefill_context_parallel_size > 1
        ),
        "fast prefill (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
    }
    for name, used in splits.items():
        if used:
            raise Unsupported(
                f"{name} splits the batch within a forward pass, which is not supported beside "
                "steering: start vLLM without it",
                code="split_batch",
            )


@dataclass
class ScheduledRequest:
    """A known request in the coming pass, whose last `drafts` tokens were drafted; its first row of
    logits is `logits`.

    `selected` are the rules that select its last token, kept where coming tokens may have others;
    `variants` are those of inline constants by such rules, and empty where the request is not
    steered by the compiled graph itself.
    """

    request: WorkerRequest
    index: int
    offset: int
    start: int
    ids: Ints
    drafts: int
    logits: int
    selected: int = field(default=0, init=False)
    variants: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.request.changes:
            self.selected = int(self.request.selected(self.start, self.ids)[-1])

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + len(self.ids))

    @property
    def first_draft(self) -> int:
        """The position of its first drafted token."""
        return self.start + len(self.ids) - self.drafts

    @property
    def fixed_until(self) -> int:
        """The position up to which what the tokens to come need depends on their ids alone; its own
        where the next one may need something else."""
        request = self.request
        if request.readouts is not None and self.start < len(request.prompt):
            return self.start
        if request.states or request.attention is not None:
            return self.start
        return FOREVER if request.plan is None else request.fixed_until(self.start)


class RunningPass(Protocol):
    """A forward pass that steers or reads somebody."""

    def start(self) -> None:
        """Makes this the pass that the model's taps reach."""

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        """Takes the same requests a token further (`Step.carry_on`)."""

    def take(self, decisions: Decisions) -> None:
        """Does what gates of earlier stages decided; called before the pass."""

    def decisions(self) -> Decisions | None:
        """What gates have decided up to the end of this stage; None where nobody has one."""

    def finish(self) -> None:
        """Counts what was done; raises `EngineError` if a hook point was never reached."""


@dataclass
class Prepared:
    """The step records the tokens of `rows` `[T]`; those of `inline` requests are recorded beside
    it, at `inline_places` with `inline_rows` and `inline_selected`."""

    placed: Sequence[ScheduledRequest]
    rows: Ints
    positions: Ints
    inline: Sequence[ScheduledRequest]
    inline_places: Ints
    inline_rows: Ints
    inline_selected: Ints
    running: RunningPass | None
    readings: Readings | None = None
    attending: Sequence[AttendedRows] = ()
    """What attentions write down of it."""

    def __post_init__(self) -> None:
        self._offsets = np.array([one.offset for one in self.placed], dtype=np.int64)
        self._indices = np.array([one.index for one in self.placed], dtype=np.int64)
        self._logit_rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._changing_inline = [
            (number, one) for number, one in enumerate(self.inline) if one.request.changes
        ]
        # A request that is not steered found no room: it is at fault, and nothing is edited for it.
        self._changing = [
            one
            for one in self.placed
            if one.request.changes and not one.variants and one.request.steered is not None
        ]

    @cached_property
    def _until(self) -> Ints:
        """The position of each request at which the pass must be built anew."""
        return np.array([one.fixed_until for one in self.placed], dtype=np.int64)

    def logit_rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The ledger rows of those of `placed` who are told where numbers run over, and their rows
        in the logits of the batch, one for each that is computed of a request, with the positions
        of the tokens that these come from: where they stood at first, when the pass is carried
        on."""
        if self._logit_rows is None:
            rows: list[int] = []
            logits: list[int] = []
            positions: list[int] = []
            for one in self.placed:
                if not one.request.tells_overflow:
                    continue
                count = 1 + one.drafts
                rows += [one.request.row] * count
                logits += range(one.logits, one.logits + count)
                positions += range(one.first_draft - 1, one.first_draft + one.drafts)
            ledger, index, at = (
                torch.tensor(of, device=device) for of in (rows, logits, positions)
            )
            self._logit_rows = ledger, index, at
        return self._logit_rows

    def write_inline(self, ledger: PositionLedger) -> None:
        """Records the tokens that the compiled graph steered by itself."""
        if len(self.inline_places):
            positions = self.positions[self.inline_places]
            ledger.write(self.inline_rows, positions, self.inline_selected)

    def carry_on(self, batch: BatchTokens, shifts: Shifts) -> bool:
        """Takes the same requests on by one token each; false where the pass must be built anew.

        Assumes: every request was one token in this pass.
        """
        starts = batch.starts[self._indices]
        if (starts >= self._until).any():
            return False
        self.positions[self._offsets] = starts
        for number, one in self._changing_inline:
            selected = _selected_now(one, batch)
            if selected != one.selected:
                variant = one.variants.get(selected)
                if variant is None:
                    return False
                one.selected = self.inline_selected[number] = selected
                shifts.change(one.offset, variant)
        changes: dict[int, Ints] = {}
        for one in self._changing:
            selected = _selected_now(one, batch)
            if selected != one.selected:
                one.selected = selected
                changes[one.offset] = _slots(one, selected)
        if self.readings is not None:
            self.readings.move(dict(zip(self._offsets.tolist(), starts.tolist(), strict=True)))
        if self.running is not None:
            self.running.carry_on(changes)
        return True


def _selected_now(placed: ScheduledRequest, batch: BatchTokens) -> int:
    """The rules that select the token of a request in `batch`, in which each has one."""
    request, index = placed.request, placed.index
    token = int(batch.tokens[index]) if request.reads_tokens else -1
    return request.selected_at(int(batch.starts[index]), token)


def _slots(placed: ScheduledRequest, selected: int) -> Ints:
    """The slot `[P]` of the request's token in each rule that `selected` name."""
    steered, plan = placed.request.steered, placed.request.plan
    assert steered is not None
    assert plan is not None
    numbers = np.arange(len(plan.rules), dtype=np.int64)
    return (selected >> numbers & 1) * steered.slot
