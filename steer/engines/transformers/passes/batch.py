"""The rows of somebody else's generation loop: which there are, and how far each has come."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from steer.batch.ledger import UNSEEN, PositionLedger
from steer.batch.requests import NOBODY, Ints, Span, SteeredRequest
from steer.batch.step import CarriedStep, Step, build_step
from steer.batch.tables import Tables
from steer.engines.base import Receipt
from steer.engines.receipts import receipt_of, shares_of
from steer.engines.transformers.cache import given_cache
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.passes.call import PassCall, unclear
from steer.engines.transformers.passes.watch import Generation
from steer.errors import SpecError
from steer.plan.plan import SteeringPlan


class _PassTokens(NamedTuple):
    """What a pass feeds: its step, and each token's row and position `[T]`."""

    step: Step | None
    rows: Ints
    positions: Ints


class AttachedBatch:
    """A `PassListener` that steers every pass by `plan`.

    A batch begins with a call of `generate`, which says how long the prompt is; outside of one,
    with a pass that does not go on from what the last one left in the cache, and then the prompt
    is what that pass feeds on top of its cache.

    Guarantees: a token is steered by its true position, or the pass is refused; receipts count
    the tokens that were fed and that the cache has kept, each once.
    """

    def __init__(self, hooked: HookedModel, plan: SteeringPlan) -> None:
        self._hooked, self._plan = hooked, plan
        self._tables = Tables(hooked.info, slots=1, device=hooked.device)
        self._slot = self._tables.acquire(plan)
        self._reads_tokens = any(one.selection.reads_tokens for one in plan.rules)
        self._reads_prompt = any(
            one.selection.reads_prompt or (one.gate is not None and one.gate.prompt_scope)
            for one in plan.rules
        )
        self._requests: list[SteeredRequest] = []
        self._padding: list[int] = []
        self._ledger = PositionLedger(0, 0, hooked.device)
        self._prompt_columns = self._end = 0
        self._generation: Generation | None = None
        self._cache: Callable[[], Any] = _nothing
        self._given: Any = None
        self._held: Any = None
        self._carried: CarriedStep | None = None
        self._pass: _PassTokens | None = None

    def receipts(self) -> list[Receipt]:
        """What was applied to each row of the last batch."""
        found = []
        for steered in self._requests:
            applied = self._ledger.applied[steered.row]
            positions = np.flatnonzero(applied != UNSEEN)
            kept = applied[positions].astype(np.int64)
            counts = np.bincount(kept, minlength=self._ledger.tokens.shape[1])
            shares = shares_of(steered, positions, kept)
            found.append(
                receipt_of(steered, self._plan, self._ledger, counts, len(kept), shares=shares)
            )
        return found

    def begin(self, call: PassCall, generation: Generation | None) -> None:
        carried = self._carried
        if carried is not None and self._is_next(call, generation) and carried.carry_on():
            assert self._pass is not None
            now = self._pass._replace(positions=self._pass.positions + 1)
            self._ledger.widen(int(now.positions.max()) + 1)
        else:
            now = self._placed(call, generation)
        self._end = call.past + call.shape[1]
        self._ledger.expect(now.rows, now.positions)
        self._pass, self._given = now, call.cache
        self._hooked.begin(now.step)

    def end(self, output: Any) -> None:
        now = self._pass
        assert now is not None
        self._hooked.end()
        if now.step is None:
            present = now.rows != NOBODY
            self._ledger.write(now.rows[present], now.positions[present], np.zeros(present.sum()))
        given, self._given = self._given, None
        cache = _cache_in(output) if given is None else given
        # A cache that is a plain list (RWKV) says no length: the next pass with it is refused.
        kept = cache is not None and not isinstance(cache, list | tuple)
        self._cache = weakref.ref(cache) if kept else _nothing
        # A generate's own cache is gone when it returns; what it has kept is read before.
        self._held = cache if self._generation is not None else None

    def generated(self) -> None:
        """Forgets the tokens that were drafted last and not kept."""
        cache, self._held, self._generation = self._held, None, None
        if cache is not None:
            self._forget(int(cache.get_seq_length()))

    def _is_next(self, call: PassCall, generation: Generation | None) -> bool:
        """Whether a pass computes a token more for each row of the last one."""
        following = (
            call.shape == (len(self._requests), 1)
            and 0 < call.past == self._end
            and generation is self._generation
            and call.cache is self._cache()
        )
        if following and generation is None:
            call.check_position_ids(self._padding)
        return following

    def _placed(self, call: PassCall, generation: Generation | None) -> _PassTokens:
        (count, columns), past = call.shape, call.past
        padding = call.padding(None if generation is None else generation.mask)
        if self._reads_tokens and call.ids is None:
            raise SpecError(
                "the spec looks at token ids, and the pass was given embeddings alone: give the "
                "model input_ids",
                code="unknown_tokens",
                param="/where/tokens",
            )
        if self._starts_a_batch(call, generation):
            self._restart(call, generation)
        else:
            self._check_goes_on(call, generation)
            self._check_padding(padding)
            self._forget(past)
        self._place(padding)
        spans = []
        rows = np.full(count * columns, NOBODY, dtype=np.int64)
        positions = np.zeros(count * columns, dtype=np.int64)
        for row, (steered, before) in enumerate(zip(self._requests, padding, strict=True)):
            first = min(max(before - past, 0), columns)
            mine = np.arange(past + first, past + columns, dtype=np.int64) - before
            tokens = np.full(len(mine), -1, dtype=np.int64)
            if call.ids is not None and self._reads_tokens:
                tokens = call.ids[row, first:].cpu().numpy().astype(np.int64)
            span = Span(steered, row * columns + first, mine, tokens)
            spans.append(span)
            rows[span.place], positions[span.place] = row, mine
        self._ledger.widen(int(positions.max(initial=0)) + 1)
        step = build_step(self._tables, self._ledger, spans, count * columns)
        decoding = bool(past) and columns == 1
        self._carried = CarriedStep(step, self._fixed_for(positions) - 1) if decoding else None
        return _PassTokens(step, rows, positions)

    def _starts_a_batch(self, call: PassCall, generation: Generation | None) -> bool:
        if generation is not None:
            return generation is not self._generation
        if not self._requests or call.past == 0:
            return True
        if call.cache is self._cache():
            return call.past < self._prompt_columns
        return call.shape[0] != len(self._requests) or call.past != self._end

    def _check_goes_on(self, call: PassCall, generation: Generation | None) -> None:
        """Raises `SpecError` where it is not clear what the pass adds to the batch."""
        (count, columns), past = call.shape, call.past
        mine = call.cache is self._cache()
        if count != len(self._requests):
            raise unclear(
                f"the batch began with {len(self._requests)} rows and goes on with {count}: begin "
                "a new one, with a generate or a cache of its own"
            )
        if generation is None:
            if self._reads_prompt and (columns > 1 or not mine):
                raise unclear(
                    f"{columns} more tokens are fed after the first pass of the batch, and the "
                    "spec asks whether they are the prompt's or generated: feed the prompt in one "
                    "pass, or let generate do it (it may, with prefill_chunk_size)"
                )
        elif call.cache is None and columns == self._end + 1:
            pass  # Without a cache, every pass feeds all again.
        elif not (past == self._end or (mine and 0 < past < self._end)):
            raise unclear(
                "inside generate the model runs on another sequence than the one generated (as for "
                "guidance_scale): leave that out, or call the model for it in a block of its own"
            )

    def _check_padding(self, padding: list[int]) -> None:
        """Raises `SpecError` where a row's padding is another than it was when it was fed."""
        for row, (before, now) in enumerate(zip(self._padding, padding, strict=True)):
            # A row that was padding so far may turn out to have more of it.
            if now != before and not (now > before >= self._end - 1):
                raise unclear(
                    f"row {row} began after {before} columns of padding, and now the mask (or that "
                    f"there is none) says {now}: give every pass the mask of the whole sequence"
                )

    def _restart(self, call: PassCall, generation: Generation | None) -> None:
        count, columns = call.shape
        prompt = None if generation is None else generation.columns
        self._prompt_columns = call.past + columns if prompt is None else prompt
        self._generation = generation
        self._ledger = PositionLedger(count, self._prompt_columns, self._hooked.device)
        self._requests, self._padding = [], []

    def _place(self, padding: list[int]) -> None:
        """The rows' requests, once their padding is known (it may fill more than a chunk)."""
        if padding != self._padding or not self._requests:
            self._padding = padding
            self._requests = [
                SteeredRequest(row, max(self._prompt_columns - before, 0), self._plan, self._slot)
                for row, before in enumerate(padding)
            ]

    def _forget(self, column: int) -> None:
        """Tokens from `column` on, which the cache has not kept."""
        for row, before in enumerate(self._padding):
            self._ledger.forget(row, max(column - before, 0))

    def _fixed_for(self, positions: Ints) -> int:
        """For how many passes, the one of the tokens at `positions` included, one a row, its step
        holds."""
        if self._plan.gated:
            return 0
        places: list[int] = positions.tolist()
        each = zip(self._requests, places, strict=True)
        return min(steered.fixed_until(place) - place for steered, place in each)


def _cache_in(output: Any) -> Any:
    """The key-value cache among what a decoder returns; None where it made none."""
    if isinstance(output, tuple):
        return next((one for one in output if hasattr(one, "get_seq_length")), None)
    return given_cache(output) if hasattr(output, "keys") else None


def _nothing() -> None:
    return None
